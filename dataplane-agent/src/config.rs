//! Settings: each is an option and an environment variable, parsed once into a type that only holds valid values.
//! Variables that ztunnel has too keep its names.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::observe::levels;
use crate::observe::log::Format;

/// Options of `dataplane run`.
#[derive(Args, Clone, Debug)]
#[command(next_line_help = true)]
pub struct RunOptions {
    /// Folder of Kubernetes manifests that describes the mesh: Namespaces, Pods, Services,
    /// EndpointSlices, ServiceAccounts, AuthorizationPolicies, PeerAuthentications, Nodes, Gateways. It
    /// is watched.
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
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: NodeName,
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
    /// for, at two each, and 20 for each pod.
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
        default_value = DEFAULT_CLUSTER,
        value_parser = cluster
    )]
    pub cluster_id: String,
    /// Network of this node: what of the mesh has another one's label is not connected to directly.
    #[arg(
        long,
        env = "NETWORK",
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub network: String,
    /// How long a workload's certificate lives; it is renewed at half of that.
    #[arg(long, env = "SECRET_TTL", value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// What is logged: a level (off, error, warn, info, debug, trace), or target=level, separated by
    /// commas. Targets are the third word of each line, or what it begins with: access, control.
    /// What h2 and rustls say of peers is logged where it is asked for, as by h2=debug.
    #[arg(long, env = "RUST_LOG", value_name = "LEVELS", default_value = DEFAULT_LEVELS, value_parser = directives)]
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

const DEFAULT_LEVELS: &str = "info";

/// istiod's default name of a cluster.
pub const DEFAULT_CLUSTER: &str = "Kubernetes";

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
    /// Returns the folder of a node.
    pub fn of_node(&self, node: &NodeName) -> PathBuf {
        self.run_dir.join(node.as_str())
    }

    /// Returns the path of a node's admin socket.
    pub fn socket(&self, node: &NodeName) -> PathBuf {
        self.of_node(node).join(ADMIN_SOCKET)
    }

    /// Returns the path of a proxy half's admin socket. It is outside of the node's folder, as the proxy may start
    /// before the node does.
    pub fn proxy_socket(&self, node: &NodeName) -> PathBuf {
        self.run_dir.join(format!("{node}.proxy.sock"))
    }

    /// Returns the path of the file that each proxy half of a node locks.
    pub fn proxy_lock(&self, node: &NodeName) -> PathBuf {
        self.run_dir.join(format!("{node}.proxy.lock"))
    }

    /// Returns the path of the socket by which a node half lends its pods to proxy halves.
    pub fn seam(&self, node: &NodeName) -> PathBuf {
        self.of_node(node).join(SEAM_SOCKET)
    }

    /// Checks that the path of the admin socket is not too long for the kernel.
    ///
    /// # Errors
    /// It is too long; the text has both lengths.
    pub fn socket_fits(&self, node: &NodeName) -> Result<(), String> {
        let socket = self.socket(node);
        let length = socket.as_os_str().len();
        if length <= SOCKET_PATH {
            return Ok(());
        }
        Err(format!(
            "--node, --run-dir: the path of the admin socket has {length} bytes, and the kernel takes \
             {SOCKET_PATH}: {}",
            socket.display()
        ))
    }
}

/// The file name of the admin socket in a node's folder.
pub const ADMIN_SOCKET: &str = "admin.sock";
/// The file name of the socket between the two halves there.
pub const SEAM_SOCKET: &str = "zds.sock";

/// Most bytes in `sun_path` of `struct sockaddr_un`, without the final zero.
const SOCKET_PATH: usize = 107;

/// The name of a node: an RFC 1123 subdomain, as in Kubernetes. It is used in paths, so it can never be empty,
/// begin with a dot, or contain a slash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// Returns its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !is_subdomain(text) {
            return Err(
                "a node's name has lower case letters and digits, with `-` and `.` between them, and \
                 at most 253 of them"
                    .into(),
            );
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for NodeName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_subdomain(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.iter().all(|&byte| alphanumeric(byte) || byte == b'-')
            && bytes.first().is_some_and(|&byte| alphanumeric(byte))
            && bytes.last().is_some_and(|&byte| alphanumeric(byte))
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

/// The prefix of all variables that only we use.
const OWN: &str = "DATAPLANE_";
/// Variables with the prefix that are no settings: they are for the build and the tests.
const NO_SETTINGS: [&str; 2] = ["DATAPLANE_BIN", "DATAPLANE_EBPF_OBJECTS"];

/// Returns a variable with our prefix that no option of `program` and its commands is set by: a misspelt setting
/// must not be ignored.
pub fn unknown_variable(
    names: impl IntoIterator<Item = String>,
    program: &clap::Command,
) -> Option<String> {
    names.into_iter().find(|name| {
        name.strip_prefix(OWN).is_some_and(|rest| {
            !rest.starts_with("TEST_")
                && !NO_SETTINGS.contains(&name.as_str())
                && !is_of_a_service(rest)
                && !sets(name, program)
        })
    })
}

fn sets(name: &str, command: &clap::Command) -> bool {
    let mut options = command.get_arguments();
    options.any(|option| option.get_env().is_some_and(|variable| variable == name))
        || command.get_subcommands().any(|command| sets(name, command))
}

/// Returns `true` for variables that Kubernetes sets in every container for a Service whose name begins with
/// `dataplane`: `DATAPLANE_SERVICE_HOST`, `DATAPLANE_PORT_15020_TCP_ADDR`, and so on.
fn is_of_a_service(rest: &str) -> bool {
    let words: Vec<&str> = rest.split('_').collect();
    let is_number = |word: &str| word.parse::<u16>().is_ok();
    (0..words.len()).any(|at| match &words[at..] {
        ["SERVICE", "HOST" | "PORT"] | ["PORT"] => true,
        // A port's name follows, which may have several words.
        ["SERVICE", "PORT", ..] => true,
        ["PORT", number, "TCP" | "UDP" | "SCTP", of @ ..] => {
            is_number(number) && matches!(of, [] | ["ADDR" | "PORT" | "PROTO"])
        }
        _ => false,
    })
}

/// Parses a time with a unit, `500ms`, `30s`, `5m`, `24h` or `7d`, or in seconds without one.
///
/// # Errors
/// The text is not a time, or the time is zero, or a century or more.
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

fn domain(text: &str) -> Result<String, String> {
    if is_subdomain(text) {
        Ok(text.to_owned())
    } else {
        Err("a domain has lower case letters, digits, `-` and `.`".into())
    }
}

fn cluster(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("a cluster has a name".into()),
        _ => Ok(text.to_owned()),
    }
}

/// Parses log directives; empty text means the default, as Kubernetes sets an unset variable to nothing.
fn directives(text: &str) -> Result<String, String> {
    match text {
        "" => Ok(DEFAULT_LEVELS.into()),
        text => levels::check(text).map(|()| text.to_owned()),
    }
}

/// Returns the canonical path of a folder.
///
/// # Errors
/// It does not exist, or is not a folder; the text names `setting`.
pub fn folder(setting: &str, path: &Path) -> Result<PathBuf, String> {
    match std::fs::canonicalize(path) {
        Ok(found) if found.is_dir() => Ok(found),
        Ok(_) => Err(format!("{setting}: {} is not a folder", path.display())),
        Err(error) => Err(format!("{setting}: {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

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
            options.places.socket(&options.node),
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
    fn levels_that_are_set_to_nothing_are_those_that_hold_without() {
        let log = |levels| {
            let options = parse(&["--manifests", "m", "--node", "one", "--log", levels]);
            options.expect("levels").log
        };
        assert_eq!(log(""), "info");
        assert_eq!(log("warn,access=debug"), "warn,access=debug");
    }

    #[test]
    fn a_nodes_name_is_a_part_of_a_path_and_nothing_else() {
        for good in [
            "a",
            "one",
            "node-1.example.com",
            "10.0.0.1",
            &"n".repeat(253),
        ] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "/",
            "/etc",
            "a/b",
            "a/..",
            ".a",
            "a.",
            "a..b",
            "-a",
            "a-",
            "a-.b",
            "a.-b",
            "A",
            "a b",
            "a\n",
            "a\0",
            "a:b",
            "ä",
            "a_b",
            &"n".repeat(254),
        ] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_socket_that_the_kernel_does_not_take_is_told_before_anything_is_made() {
        let mut options = parse(&["--manifests", "m", "--node", "one"]).expect("enough");
        assert_eq!(options.places.socket_fits(&options.node), Ok(()));
        options.node = "n".repeat(81).parse().expect("a name");
        assert_eq!(options.places.socket_fits(&options.node), Ok(()));
        options.node = "n".repeat(82).parse().expect("a name");
        let error = options
            .places
            .socket_fits(&options.node)
            .expect_err("too long");
        assert!(
            error.contains("--node, --run-dir: ") && error.contains("108 bytes"),
            "{error}"
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
        let unknown = |all: &[&str]| unknown_variable(names(all), &Line::command());
        assert_eq!(unknown(&["PATH", "DATAPLANE_STATE"]), None);
        let wrong = unknown(&["DATAPLANE_STAT"]);
        assert_eq!(wrong.as_deref(), Some("DATAPLANE_STAT"));
    }

    #[test]
    fn what_kubernetes_sets_for_a_service_of_our_name_is_no_setting_of_ours() {
        for name in [
            "DATAPLANE_SERVICE_HOST",
            "DATAPLANE_SERVICE_PORT",
            "DATAPLANE_SERVICE_PORT_HTTP_METRICS",
            "DATAPLANE_PORT",
            "DATAPLANE_PORT_15020_TCP",
            "DATAPLANE_PORT_15020_TCP_ADDR",
            "DATAPLANE_PORT_53_UDP_PROTO",
            "DATAPLANE_METRICS_SERVICE_HOST",
            "DATAPLANE_METRICS_PORT_80_TCP_PORT",
        ] {
            assert_eq!(unknown_variable([name.to_owned()], &Line::command()), None);
        }
        for name in [
            "DATAPLANE_SERVICE",
            "DATAPLANE_PORTS",
            "DATAPLANE_PORT_X_TCP",
            "DATAPLANE_HOST",
        ] {
            let unknown = unknown_variable([name.to_owned()], &Line::command());
            assert_eq!(unknown.as_deref(), Some(name));
        }
    }

    #[test]
    fn a_cluster_has_a_name() {
        let told = |name| parse(&["--manifests", "/m", "--node", "n", "--cluster-id", name]);
        for empty in ["", " "] {
            let error = told(empty).expect_err("no name");
            assert!(error.contains("--cluster-id"), "{error}");
        }
        assert_eq!(told("east").expect("a name").cluster_id, "east");
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
