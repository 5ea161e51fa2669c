//! Settings: each an option and an environment variable, parsed once into types that cannot be
//! wrong. Variables that ztunnel has keep its names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::observe::log::Format;

/// Options of `dataplane run`.
#[derive(Args, Clone, Debug)]
#[command(next_line_help = true)]
pub struct RunOptions {
    /// Folder of Kubernetes manifests that describes the mesh: Namespaces, Pods, Services,
    /// ServiceAccounts, AuthorizationPolicies, PeerAuthentications. It is watched.
    #[arg(
        long,
        env = "DATAPLANE_MANIFESTS",
        value_name = "DIR",
        required_unless_present = "local_xds_path",
        conflicts_with = "local_xds_path"
    )]
    pub manifests: Option<PathBuf>,
    /// ztunnel's LOCAL_XDS file, in place of manifests; read once.
    #[arg(long, env = "LOCAL_XDS_PATH", value_name = "FILE")]
    pub local_xds_path: Option<PathBuf>,
    /// Name of this node: pods whose spec.nodeName it is are served.
    #[arg(long, env = "NODE_NAME", value_name = "NAME", value_parser = node_name)]
    pub node: String,
    /// Folder that the nodes of a mesh share: the embedded CA, and the records of enrolled pods.
    #[arg(
        long,
        env = "DATAPLANE_STATE",
        value_name = "DIR",
        default_value = "/var/lib/dataplane"
    )]
    pub state: PathBuf,
    /// Cgroup (v2) that holds the pods; the root of the hierarchy if not set.
    #[arg(long, env = "DATAPLANE_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// How long connections may go on when their pod leaves the mesh, or the agent ends.
    #[arg(long, env = "DATAPLANE_DRAIN", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain: Duration,
    /// Threads that carry connections; as many as there are processors if not set.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// How many connections and tunnels there may be at once; a further one is refused. If not set,
    /// as many as fit into half of the memory, at 128 KiB each. Never more than there are descriptors
    /// for, at two each.
    #[arg(long, env = "DATAPLANE_CONNECTIONS", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: Option<u32>,
    /// Trust domain of the mesh.
    #[arg(long, env = "TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local", value_parser = domain)]
    pub trust_domain: String,
    /// What the names of services end in.
    #[arg(long, env = "CLUSTER_DOMAIN", value_name = "NAME", default_value = "cluster.local", value_parser = domain)]
    pub cluster_domain: String,
    /// Name of the cluster.
    #[arg(
        long,
        env = "CLUSTER_ID",
        value_name = "NAME",
        default_value = "Kubernetes"
    )]
    pub cluster_id: String,
    /// How long a workload's certificate lives; it is renewed at half of that.
    #[arg(long, env = "SECRET_TTL", value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// What is logged: a level (off, error, warn, info, debug, trace), or target=level, separated by
    /// commas.
    #[arg(long, env = "RUST_LOG", value_name = "LEVELS", default_value = "info", value_parser = levels)]
    pub log: String,
    /// How it is logged.
    #[arg(
        long,
        env = "LOG_FORMAT",
        value_name = "FORMAT",
        value_enum,
        default_value_t
    )]
    pub log_format: Format,
    /// Where the agent keeps what it needs while it runs.
    #[command(flatten)]
    pub places: Places,
}

/// Where an agent's traces are; the same for all subcommands that look for them.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Folder for what is running: the admin socket, and how to undo what was changed.
    #[arg(
        long,
        env = "DATAPLANE_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/dataplane"
    )]
    pub run_dir: PathBuf,
    /// A BPF file system, where kernel programs are pinned; mounted if it is not.
    #[arg(
        long,
        env = "DATAPLANE_BPFFS",
        value_name = "DIR",
        default_value = "/sys/fs/bpf"
    )]
    pub bpffs: PathBuf,
}

impl Places {
    /// The folder of one node.
    pub fn of_node(&self, node: &str) -> PathBuf {
        self.run_dir.join(node)
    }

    /// The admin socket of one node.
    pub fn socket(&self, node: &str) -> PathBuf {
        self.of_node(node).join("admin.sock")
    }
}

/// Names of all variables that are ours alone.
const OWN: &str = "DATAPLANE_";
/// What of them there is. The last two are the tests'.
const KNOWN: [&str; 9] = [
    "DATAPLANE_MANIFESTS",
    "DATAPLANE_STATE",
    "DATAPLANE_CGROUP",
    "DATAPLANE_CONNECTIONS",
    "DATAPLANE_DRAIN",
    "DATAPLANE_RUN_DIR",
    "DATAPLANE_BPFFS",
    "DATAPLANE_BIN",
    "DATAPLANE_TEST_APP",
];

/// A variable with our prefix that does not exist: a misspelt setting must not be passed over.
pub fn unknown_variable(names: impl IntoIterator<Item = String>) -> Option<String> {
    names.into_iter().find(|name| {
        name.starts_with(OWN)
            && !KNOWN.contains(&name.as_str())
            && !name.starts_with("DATAPLANE_TEST_")
            && name != "DATAPLANE_EBPF_OBJECTS"
    })
}

/// A time with its unit: `500ms`, `30s`, `5m`, `24h`, `7d`, or seconds without one.
///
/// # Errors
/// It is none, or zero.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| "a number with a unit is wanted: 500ms, 30s, 5m, 24h".to_owned())?;
    let time = match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        "d" => number.checked_mul(86400).map(Duration::from_secs),
        unit => return Err(format!("`{unit}` is no unit; ms, s, m, h and d are")),
    };
    match time {
        Some(time) if !time.is_zero() && time < Duration::from_secs(100 * 365 * 86400) => Ok(time),
        _ => Err("more than nothing and less than a century is wanted".into()),
    }
}

fn node_name(text: &str) -> Result<String, String> {
    let fit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let good = text.len() <= 253
        && text.chars().all(fit)
        && ends(text.chars().next())
        && ends(text.chars().last())
        && !text.contains("..");
    if good {
        Ok(text.to_owned())
    } else {
        Err("a node's name has lower case letters, digits, `-` and `.`".into())
    }
}

fn domain(text: &str) -> Result<String, String> {
    node_name(text).map_err(|_| "a domain has lower case letters, digits, `-` and `.`".into())
}

fn levels(text: &str) -> Result<String, String> {
    let is_level = |level: &str| {
        ["off", "error", "warn", "info", "debug", "trace"]
            .iter()
            .any(|known| level.eq_ignore_ascii_case(known))
    };
    for part in text.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if !is_level(level) {
            return Err(format!("`{level}` is no level"));
        }
    }
    Ok(text.to_owned())
}

/// Whether a folder is there; the setting that names it is named when it is not.
///
/// # Errors
/// It is not there, or is not a folder.
pub fn folder(setting: &str, path: &Path) -> Result<PathBuf, String> {
    match std::fs::canonicalize(path) {
        Ok(found) if found.is_dir() => Ok(found),
        Ok(_) => Err(format!("{setting}: {} is not a folder", path.display())),
        Err(error) => Err(format!("{setting}: {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        run: RunOptions,
    }

    fn parse(arguments: &[&str]) -> Result<RunOptions, String> {
        let line = ["run"].iter().chain(arguments);
        let parsed = Line::try_parse_from(line).map(|line| line.run);
        parsed.map_err(|error| error.to_string())
    }

    #[test]
    fn the_least_is_a_source_and_a_node() {
        let options = parse(&["--manifests", "m", "--node", "one"]).expect("enough");
        assert_eq!(options.secret_ttl, Duration::from_secs(86400));
        assert_eq!(
            options.places.socket("one"),
            Path::new("/run/dataplane/one/admin.sock")
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = ["--manifests", "m", "--node", "one"];
        for (wrong, name) in [
            (&["--drain", "soon"][..], "--drain"),
            (&["--drain", "0s"], "--drain"),
            (&["--workers", "0"], "--workers"),
            (&["--connections", "0"], "--connections"),
            (&["--secret-ttl", "1y"], "--secret-ttl"),
            (&["--trust-domain", "a b"], "--trust-domain"),
            (&["--log", "loud"], "--log"),
            (&["--log-format", "xml"], "--log-format"),
            (&["--local-xds-path", "f"], "--local-xds-path"),
            (&["--colour", "red"], "--colour"),
        ] {
            let arguments: Vec<&str> = good.iter().chain(wrong).copied().collect();
            let error = parse(&arguments).expect_err(name);
            assert!(error.contains(name), "{name}: {error}");
        }
        let error = parse(&["--manifests", "m", "--node", "../x"]).expect_err("a bad name");
        assert!(error.contains("--node"), "{error}");
        assert!(
            parse(&["--node", "one"])
                .expect_err("no source")
                .contains("--manifests")
        );
    }

    #[test]
    fn a_misspelt_variable_is_found() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(unknown_variable(names(&["PATH", "DATAPLANE_STATE"])), None);
        let wrong = unknown_variable(names(&["DATAPLANE_STAT"]));
        assert_eq!(wrong.as_deref(), Some("DATAPLANE_STAT"));
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for wrong in [
            "",
            "s",
            "-1s",
            "1.5h",
            "1 h",
            "99999999999999999999s",
            "9999999d",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
