//! Log directives: how they are checked and parsed.

use tracing_subscriber::filter::EnvFilter;

/// The first components of our modules' targets, as the log shows them.
const OWN_TARGETS: [&str; 13] = [
    "agent", "cli", "config", "control", "drain", "exit", "load", "mesh", "node", "observe",
    "proxy", "seam", "sys",
];
/// Other targets that may be logged: those without a module, and libraries.
const OTHER_TARGETS: [&str; 14] = [
    "access",
    "kernel",
    "dataplane",
    "dataplane_agent",
    "dataplane_ebpf",
    "aya",
    "axum",
    "h2",
    "hyper",
    "hyper_util",
    "mio",
    "notify",
    "rustls",
    "tokio",
];
/// The libraries that read what peers send. They warn of what is wrong with it, without a limit, so a peer could fill
/// the log. What matters of it is an error of ours, which has one.
const OF_PEERS: &str = "h2=error,rustls=error";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Checks directives: each a level, or `target=level`.
///
/// # Errors
/// A directive has no valid level. It would be taken as a target, and turn off all others.
pub fn check(directives: &str) -> Result<(), String> {
    for directive in directives.split(',') {
        let level = directive
            .rsplit_once('=')
            .map_or(directive, |(_, level)| level);
        if !LEVELS.iter().any(|known| level.eq_ignore_ascii_case(known)) {
            return Err(format!("`{level}` is no level, {} are", LEVELS.join(", ")));
        }
    }
    Ok(())
}

/// Returns an error message if there are targets that are never logged.
pub fn unknown_targets(directives: &str) -> Option<String> {
    let targets = directives
        .split(',')
        .filter_map(|directive| Some(directive.rsplit_once('=')?.0));
    let room = |target: &str| {
        target
            .split([':', '['])
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let is_known = |target: &&str| {
        let room = room(target);
        OWN_TARGETS
            .iter()
            .chain(&OTHER_TARGETS)
            .any(|known| *known == room)
    };
    let unknown: Vec<String> = targets
        .filter(|target| !is_known(target))
        .map(|target| format!("`{target}`"))
        .collect();
    (!unknown.is_empty()).then(|| {
        format!(
            "nothing is logged of {}; targets begin with access, kernel, {}",
            unknown.join(", "),
            OWN_TARGETS.join(", ")
        )
    })
}

/// Parses directives, whose targets may be written as in the log or as in the code. What libraries say of a peer is
/// left out, unless a directive names the library.
///
/// # Errors
/// They are not valid directives.
pub fn parse(directives: &str) -> Result<EnvFilter, String> {
    let of_ours = |directive: &str| {
        let is_ours = OWN_TARGETS.iter().any(|room| {
            let rest = directive.strip_prefix(room);
            rest.is_some_and(|rest| rest.starts_with("=") || rest.starts_with("::"))
        });
        match is_ours {
            true => format!("dataplane_agent::{directive}"),
            false => directive.to_owned(),
        }
    };
    let is_off = |directive: &str| directive.eq_ignore_ascii_case("off");
    let of_peers = (!directives.split(',').any(is_off)).then_some(OF_PEERS);
    let all: Vec<String> = of_peers
        .into_iter()
        .flat_map(|all| all.split(','))
        .chain(directives.split(','))
        .map(of_ours)
        .collect();
    EnvFilter::builder()
        .parse(all.join(","))
        .map_err(|error| format!("`{directives}`: {error}"))
}

#[cfg(test)]
mod tests {
    use tracing::Level;
    use tracing_subscriber::prelude::*;

    use super::*;

    #[test]
    fn levels_of_targets_that_there_are_not_are_told() {
        assert_eq!(
            unknown_targets("info,access=debug,node::pods=warn,h2=off"),
            None
        );
        assert_eq!(
            unknown_targets("dataplane_agent::node::capture=trace"),
            None
        );
        let told = unknown_targets("info,aces=debug,ztunnel::proxy=warn").expect("two");
        assert!(
            told.contains("`aces`, `ztunnel::proxy`; targets begin with access"),
            "{told}"
        );
        assert!(check("nonsense").is_err_and(|told| told.contains("`nonsense` is no level")));
        assert!(check("info,access=loud").is_err());
    }

    #[test]
    fn targets_are_those_that_are_in_the_log() {
        let filter = parse("warn,node::pods=debug,controls=info").expect("directives");
        let shown = filter.to_string();
        assert!(
            shown.contains("dataplane_agent::node::pods=debug"),
            "{shown}"
        );
        assert!(
            shown.contains("controls=info") && !shown.contains("::controls"),
            "{shown}"
        );
        let modules = include_str!("../lib.rs");
        let modules = modules
            .lines()
            .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
        assert!(modules.eq(OWN_TARGETS), "OWN_TARGETS has all modules");
    }

    #[test]
    fn what_libraries_say_of_a_peer_is_logged_where_it_is_asked_for() {
        let logged = |directives: &str| {
            let filter = parse(directives).expect("directives");
            let log = tracing_subscriber::registry().with(filter);
            tracing::subscriber::with_default(log, || {
                (
                    tracing::enabled!(target: "h2::proto::ping_pong", Level::WARN),
                    tracing::enabled!(target: "rustls::msgs::handshake", Level::WARN),
                    tracing::enabled!(target: "rustls::msgs::handshake", Level::ERROR),
                    tracing::enabled!(target: "aya", Level::WARN),
                )
            })
        };
        assert_eq!(logged("info"), (false, false, true, true));
        assert_eq!(logged("trace,access=debug"), (false, false, true, true));
        assert_eq!(logged("info,h2=debug"), (true, false, true, true));
        assert_eq!(logged("off"), (false, false, false, false));
        assert_eq!(logged("off,rustls=warn"), (false, true, true, false));
    }
}
