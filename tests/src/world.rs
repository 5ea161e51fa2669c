//! A mesh on this machine: nodes with a wire between them, and pods on the nodes.
//!
//! A node is a network namespace that forwards, and a cgroup that holds its pods. A pod is a
//! network namespace with a veth to its node, and a cgroup below the node's. Pods of a node have the
//! addresses `10.p.k.i` and `fd00:p:k::i`, and are routed, not bridged. No two nodes share `p` and
//! `k`, which are the process's [claim] and a count, as two namespaces with one address are ambiguous to
//! an agent. Addresses from 10.96 on are for services, the wire, and unused ones.

use std::cell::Cell;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::MntFlags;

use crate::agent::{Agent, CAPABILITIES, PROXY_CAPABILITIES, Setup};
use crate::cgroup::{self, Cgroup};
use crate::manifests::{Manifests, PodObject};
use crate::netns::{Netns, has_ipv6};
use crate::process::{Place, Process, output, place, said};
use crate::{claim, eventually, left, program, require_root, scaled};

/// Number of worlds that this process has created.
static WORLDS: AtomicU32 = AtomicU32::new(0);

/// A mesh.
#[derive(Debug)]
pub struct World {
    /// The identifier in the names of its namespaces and cgroups.
    pub id: String,
    /// Its manifests.
    pub manifests: Manifests,
    /// The state folder that its nodes share.
    pub state: PathBuf,
    /// The file that its pods see as `/etc/hosts`.
    pub hosts: PathBuf,
    /// Its own BPF file system, as different worlds have nodes of the same name.
    bpffs: Mounted,
    /// Shows [`left::sweep`] that its process lives.
    _lock: File,
    folder: tempfile::TempDir,
    /// The fields from here on are dropped in this order, inner cgroups first.
    agents: Cgroup,
    top: Rc<Cgroup>,
    nodes: Cell<u8>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its name in manifests.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// The cgroup that holds its pods.
    pub cgroup: Cgroup,
    number: u8,
    pods: Cell<u16>,
    hosts: PathBuf,
    _top: Rc<Cgroup>,
}

/// A pod, with an idle process in it.
#[derive(Debug)]
pub struct Pod {
    /// Its namespace in the mesh.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its IPv4 address.
    pub v4: IpAddr,
    /// Its IPv6 address.
    pub v6: IpAddr,
    /// The veth's end in the node's namespace.
    pub veth: String,
    _pause: Process,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its network namespace.
    pub netns: Netns,
    hosts: PathBuf,
}

/// Two pods of two nodes, in one mesh. Their connections are tunnelled, so a segment of the app's own port on a
/// pod's veth is a leak.
#[derive(Debug)]
pub struct Pair {
    /// The pod `client` of the first node.
    pub client: Pod,
    /// The pod `server` of the second.
    pub server: Pod,
    /// The first node's agent.
    pub one: Agent,
    /// The second's.
    pub two: Agent,
    /// The nodes.
    pub nodes: (Node, Node),
    /// The world that they are in.
    pub world: World,
}

impl Pair {
    /// Starts it, and waits until both pods are up, and dialled by HBONE.
    pub fn new() -> Self {
        Self::prepared(|_, _| {})
    }

    /// As [`Pair::new`]; `prepare` is called with client and server before they are enrolled.
    pub fn prepared(prepare: impl FnOnce(&Pod, &Pod)) -> Self {
        let world = World::new();
        let nodes = world.two_nodes();
        let (client, server) = (nodes.0.pod(&world, "client"), nodes.1.pod(&world, "server"));
        prepare(&client, &server);
        let (one, two) = (world.agent(&nodes.0), world.agent(&nodes.1));
        one.up(&["client"]);
        two.up(&["server"]);
        let pair = Self {
            client,
            server,
            one,
            two,
            nodes,
            world,
        };
        pair.know_each_other();
        pair
    }

    /// Waits until the client's agent has this text in its configuration.
    pub fn knows(&self, what: &str) {
        eventually(&format!("{what} is known"), 5, || {
            self.one.get("/config_dump").contains(what)
        });
    }

    /// Waits until each node's agent dials the other's pods by HBONE.
    pub fn know_each_other(&self) {
        for agent in [&self.one, &self.two] {
            eventually("both pods are in the mesh of both nodes", 10, || {
                agent.tunnelled() >= 2
            });
        }
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Creates a world without nodes, whose namespace `demo` is in the mesh.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let world = Self::named(&format!("t{:x}n{number}", std::process::id()));
        world.manifests.namespace("demo", true);
        world
    }

    /// Creates a world without nodes and without manifests.
    pub fn named(id: &str) -> Self {
        require_root();
        static SWEPT: Once = Once::new();
        SWEPT.call_once(left::sweep);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let prefix = left::folder_prefix(id);
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir()
            .expect("a folder");
        let lock = left::lock(folder.path());
        let root = cgroup::root();
        let top = Rc::new(Cgroup::new(&root.join(format!("dp-{id}"))));
        let hosts = folder.path().join("hosts");
        let bpffs = Mounted::new(folder.path().join("bpf"));
        fs::write(&hosts, "127.0.0.1 localhost\n").expect("a file");
        Self {
            id: id.to_owned(),
            manifests: Manifests::new(&folder.path().join("manifests")),
            state: folder.path().join("state"),
            hosts,
            bpffs,
            _lock: lock,
            agents: Cgroup::new(&top.folder.join("agents")),
            top,
            folder,
            nodes: Cell::new(u8::try_from(number % 100).expect("small") * 2),
        }
    }

    /// Returns a cgroup that holds no pods.
    pub fn outside(&self) -> &Path {
        &self.agents.folder
    }

    /// Returns its folder, which has the logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Creates a node; the first two have a wire between them, the interface `wire`.
    pub fn node(&self, name: &str) -> Node {
        let number = self.nodes.get() + 1;
        self.nodes.set(number);
        let netns = Netns::new(&format!("dp-{}-{name}", self.id));
        netns.set_sysctl("net.ipv4.ip_forward", "1");
        if has_ipv6() {
            netns.set_sysctl("net.ipv6.conf.all.forwarding", "1");
        }
        Node {
            name: name.to_owned(),
            cgroup: Cgroup::new(&self.top.folder.join(name)),
            netns,
            number,
            pods: Cell::new(1),
            hosts: self.hosts.clone(),
            _top: Rc::clone(&self.top),
        }
    }

    /// Creates two nodes, and a wire between them.
    pub fn two_nodes(&self) -> (Node, Node) {
        let (one, two) = (self.node("one"), self.node("two"));
        one.netns.ip(&format!(
            "link add wire type veth peer name wire netns {}\n",
            two.netns.name
        ));
        for (node, other) in [(&one, &two), (&two, &one)] {
            let (own, there) = (node.number, other.number);
            let p = claim::own();
            node.netns.ip(&format!(
                "addr add 10.255.0.{own}/24 dev wire\n\
                 link set wire up\n\
                 route add 10.{p}.{there}.0/24 via 10.255.0.{there}\n",
            ));
            node.netns.ip6(&format!(
                "addr add fd00:255::{own}/64 dev wire nodad\n\
                 route add fd00:{p:x}:{there:x}::/64 via fd00:255::{there}\n",
            ));
        }
        (one, two)
    }

    /// Returns the setup of the node's agent, which drains for five seconds, scaled.
    pub fn setup(&self, node: &Node) -> Setup {
        Setup {
            program: "DATAPLANE_BIN",
            halves: "run",
            node: node.name.clone(),
            arguments: vec![
                "--manifests".into(),
                self.manifests.folder.display().to_string(),
                "--cgroup".into(),
                node.cgroup.folder.display().to_string(),
                "--drain".into(),
                format!("{}s", scaled(Duration::from_secs(5)).as_secs()),
            ],
            variables: vec![("RUST_LOG".into(), "info,access=debug".into())],
            run_dir: self.folder.path().join("run"),
            state: self.state.clone(),
            bpffs: self.bpffs.0.clone(),
            log: self.folder.path().join(format!("{}.log", node.name)),
            place: Place {
                netns: node.netns.file(),
                cgroup: self.agents.folder.clone(),
                hosts: None,
                capabilities: Some(CAPABILITIES.iter().map(|(_, number)| *number).collect()),
            },
            restriction: None,
        }
    }

    /// Returns the setup of one half of the node's agent: `node` or `proxy`. It logs to `<log>.log`.
    pub fn half(&self, node: &Node, which: &'static str, log: &str) -> Setup {
        let mut setup = self.setup(node);
        setup.halves = which;
        if which == "proxy" {
            setup.place.capabilities = Some(PROXY_CAPABILITIES.to_vec());
        }
        setup.log = setup.log.with_file_name(format!("{log}.log"));
        setup
    }

    /// Starts the node's agent.
    pub fn agent(&self, node: &Node) -> Agent {
        Agent::start(self.setup(node))
    }

    /// Returns the path of its BPF file system.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs.0
    }

    /// Returns the pins of a node in `maps`, `links` or `pods`.
    pub fn pinned(&self, node: &str, folder: &str) -> Vec<PathBuf> {
        let node = self.bpffs().join("dataplane").join(node);
        let layouts = fs::read_dir(node).expect("pins").flatten();
        let files = layouts.flat_map(|layout| {
            let folder = layout.path().join(folder);
            fs::read_dir(folder).expect("pins").flatten()
        });
        files.map(|file| file.path()).collect()
    }
}

/// A mounted file system, unmounted on drop.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts a BPF file system on a folder that it creates.
    pub fn new(folder: PathBuf) -> Self {
        Self::of("bpf", folder, None)
    }

    /// Mounts a file system of 256 KiB on a folder that it creates.
    pub fn small(folder: PathBuf) -> Self {
        Self::of("tmpfs", folder, Some("size=256k,mode=755"))
    }

    /// Bind-mounts a file on another one that it creates.
    pub fn bind(file: &Path, at: PathBuf) -> Self {
        fs::write(&at, "").expect("a file");
        Self::over(file, at)
    }

    /// Bind-mounts a file on an existing one.
    pub fn over(file: &Path, at: PathBuf) -> Self {
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(file), &at, None::<&Path>, bind, None::<&Path>).unwrap_or_else(
            |error| panic!("mount {} on {}: {error}", file.display(), at.display()),
        );
        Self(at)
    }

    /// Mounts an empty file system over an existing folder, as if the former mount were gone.
    pub fn empty_over(folder: &Path) -> Self {
        Self::on("tmpfs", folder.to_owned(), Some("mode=755"))
    }

    fn of(kind: &str, folder: PathBuf, options: Option<&str>) -> Self {
        fs::create_dir(&folder).expect("a folder");
        Self::on(kind, folder, options)
    }

    fn on(kind: &str, folder: PathBuf, options: Option<&str>) -> Self {
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some(kind), &folder, Some(kind), none, options)
            .unwrap_or_else(|error| panic!("mount {kind} on {}: {error}", folder.display()));
        Self(folder)
    }
}

impl Mounted {
    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A file system that answers nothing, as one of a server that is away: who asks for anything in it waits. Dropping
/// it ends the waits with errors.
#[derive(Debug)]
pub struct Silent {
    /// Closed before the file system is unmounted.
    _server: File,
    _mounted: Mounted,
}

impl Silent {
    /// Mounts it over an existing folder.
    pub fn over(folder: &Path) -> Self {
        // A FUSE server that does not even answer the first request.
        let mut options = File::options();
        let server = options.read(true).write(true).open("/dev/fuse");
        let server = server.unwrap_or_else(|error| panic!("/dev/fuse: {error}"));
        let mount = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        Self {
            _mounted: Mounted::on("fuse", folder.to_owned(), Some(&mount)),
            _server: server,
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// Returns its address on the wire between the first two nodes.
    pub fn wire_v4(&self) -> IpAddr {
        IpAddr::from([10, 255, 0, self.number])
    }

    /// Creates a pod of the namespace `demo` with its object, which has the label `app: <name>` and the service
    /// account `<name>`.
    pub fn pod(&self, world: &World, name: &str) -> Pod {
        let pod = self.bare(world, "demo", name);
        world.manifests.pod(&self.object(&pod));
        pod
    }

    /// Returns the object of a pod of this node.
    pub fn object<'a>(&'a self, pod: &'a Pod) -> PodObject<'a> {
        PodObject {
            ready: true,
            namespace: &pod.namespace,
            name: &pod.name,
            node: &self.name,
            account: &pod.name,
            labels: vec![("app".into(), pod.name.clone())],
            annotations: Vec::new(),
            uid: "",
            addresses: match has_ipv6() {
                true => vec![pod.v4.to_string(), pod.v6.to_string()],
                false => vec![pod.v4.to_string()],
            },
            owner: None,
        }
    }

    /// Creates a pod without an object.
    pub fn bare(&self, world: &World, namespace: &str, name: &str) -> Pod {
        let number = self.pods.get() + 1;
        self.pods.set(number);
        let (id, node) = (&world.id, self.number);
        let netns = Netns::new(&format!("dp-{id}-{namespace}-{name}"));
        let veth = format!("veth{number}");
        let (v4, v6) = (
            format!("10.{}.{node}.{number}", claim::own()),
            format!("fd00:{:x}:{node:x}::{number:x}", claim::own()),
        );
        self.netns.ip(&format!(
            "link add {veth} type veth peer name eth0 netns {}\n\
             addr add 169.254.1.1/32 dev {veth}\n\
             link set {veth} up\n\
             route add {v4}/32 dev {veth}\n",
            netns.name
        ));
        self.netns.ip6(&format!(
            "addr add fe80::1/64 dev {veth} nodad\n\
             route add {v6}/128 dev {veth}\n"
        ));
        netns.ip(&format!(
            "addr add {v4}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1 dev eth0\n\
             route add default via 169.254.1.1 dev eth0 onlink\n"
        ));
        netns.ip6(&format!(
            "addr add {v6}/128 dev eth0 nodad\n\
             route add default via fe80::1 dev eth0\n"
        ));
        let cgroup = Cgroup::new(&self.cgroup.folder.join(format!("{namespace}-{name}")));
        let mut pause = Command::new(program("DATAPLANE_TEST_APP"));
        pause.arg("pause");
        place(
            &mut pause,
            &Place {
                netns: netns.file(),
                cgroup: cgroup.folder.clone(),
                hosts: None,
                capabilities: None,
            },
        );
        let pause = Process::start(&mut pause);
        assert_eq!(pause.line(), "ready");
        Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            v4: v4.parse().expect("an address"),
            v6: v6.parse().expect("an address"),
            veth,
            _pause: pause,
            cgroup,
            netns,
            hosts: self.hosts.clone(),
        }
    }
}

impl Pod {
    /// Returns its IPv4 address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.v4, port)
    }

    /// Returns its IPv6 address with a port.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.v6, port)
    }

    /// Returns the place of its processes.
    pub fn place(&self) -> Place {
        Place {
            netns: self.netns.file(),
            cgroup: self.cgroup.folder.clone(),
            hosts: Some(self.hosts.clone()),
            capabilities: None,
        }
    }

    /// Returns a command that runs in it.
    pub fn command(&self, name: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(name);
        command.env("HOSTNAME", &self.name);
        place(&mut command, &self.place());
        command
    }

    /// Starts the tests' app in it.
    pub fn app(&self, arguments: &[&str]) -> Process {
        Process::start(self.command(program("DATAPLANE_TEST_APP")).args(arguments))
    }

    /// Serves lines on a port: each is answered with the client's address, a space, and the line.
    pub fn serve(&self, port: u16) -> Process {
        let server = self.app(&["serve", &port.to_string()]);
        assert_eq!(server.line(), "ready");
        server
    }

    /// Sends a line to a server, from this pod; returns its answer, or the app's word for the failure.
    pub fn ask(&self, to: SocketAddr, line: &str) -> Result<String, String> {
        self.ask_with(to, line, &[])
    }

    /// As [`Pod::ask`], with options of the app's `ask`.
    pub fn ask_with(&self, to: SocketAddr, line: &str, options: &[&str]) -> Result<String, String> {
        let mut command = self.command(program("DATAPLANE_TEST_APP"));
        command.args(["ask", &to.to_string(), line]).args(options);
        said(&mut command)
    }

    /// Opens a connection that stays open: each line that is written to the process gets an answer; `closed: …` is
    /// printed at its end.
    pub fn talk(&self, to: SocketAddr) -> Process {
        let talk = self.app(&["talk", &to.to_string()]);
        assert_eq!(talk.line(), "connected");
        talk
    }

    /// As [`Pod::talk`], and waits until the server has answered. A connection that is only open may still wait
    /// in a listener's queue, and its agent not know of it.
    pub fn live(&self, to: SocketAddr) -> Process {
        let mut live = self.talk(to);
        live.say("hello");
        let answer = live.line();
        assert!(answer.ends_with(" hello"), "{to}: {answer}");
        live
    }

    /// Runs curl in it; returns its exit code and its output.
    pub fn curl(&self, arguments: &[&str]) -> (i32, String) {
        let (status, out, _) = output(self.command("curl").args(arguments));
        (status.code().unwrap_or(-1), out)
    }
}
