//! The targets. Each returns true if it took the input, and false if it rejected it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;
use std::{fs, str};

use arbitrary::Unstructured;
use dataplane_agent::control::enrolled::{self, Enrolled};
use dataplane_agent::control::local_xds;
use dataplane_agent::control::manifests::{MeshConfig, Objects, PodKey, Translation, translate};
use dataplane_agent::control::state::SharedState;
use dataplane_agent::mesh::Identity;
use dataplane_agent::mesh::workload::Protocol;
use dataplane_agent::node::capture::undo;
use dataplane_agent::proxy::hbone::headers as words;
use dataplane_agent::proxy::identity::tls::peer_identity;
use dataplane_agent::seam::wire::{self, Hello, NodeMessage, ProxyMessage};
use dataplane_agent::sys::cgroup as groups;
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::decide::{Asked, Connect, Owns, Steer, connect, connect_elsewhere, steer};
use dataplane_ebpf::event::Reason;
use dataplane_ebpf::listener::ListenerKind;
use tempfile::TempDir;

/// The certificate that a peer shows.
pub fn certificate(input: &[u8]) -> bool {
    let Ok(identity) = peer_identity(&[input.into()]) else {
        return false;
    };
    let uri = identity.to_string();
    assert!(
        input.windows(uri.len()).any(|part| part == uri.as_bytes()),
        "{uri} is not in it"
    );
    true
}

/// The text of `/proc/<pid>/cgroup`, and of `/proc/self/mounts`.
pub fn cgroup(input: &[u8]) -> bool {
    let root = Path::new("/sys/fs/cgroup");
    let folder = groups::of_process(root, input);
    if let Some(folder) = &folder {
        let below = folder.strip_prefix(root);
        let mut parts = below.expect("what is outside is nobody's").components();
        assert!(
            parts.all(|part| matches!(part, std::path::Component::Normal(_))),
            "{} leads out",
            folder.display()
        );
    }
    let text = str::from_utf8(input);
    let mount = text.map(|text| groups::mount_of(text, "cgroup2"));
    folder.is_some() || mount.is_ok_and(|mount| mount.is_some())
}

/// The kernel programs' decisions on addresses.
pub fn decide(input: &[u8]) -> bool {
    type Case = ([Choice; 4], Choice, Choice, u16, [bool; 5]);
    let Ok((own, from, to, port, [by_lo, foreign, of_pod, interface, begun])) =
        Unstructured::new(input).arbitrary::<Case>()
    else {
        return false;
    };
    let (from, to) = (from.0, to.0);
    let has = |ip: Ip| ip != Ip::NONE && own.iter().any(|choice| choice.0 == ip);
    let owns = Owns {
        from: has(from),
        to: has(to),
    };
    let family = |choice: &Choice| choice.0 != Ip::NONE && choice.0.is_v4() == to.is_v4();
    let is_here = to.is_loopback() || to.is_unspecified();
    let asked = Asked {
        foreign,
        own: owns.to,
        family: own.iter().any(family),
        interface,
    };
    match connect(asked, &to) {
        Connect::Pass => panic!("it is a pod's"),
        Connect::Local => {
            assert!(!foreign, "another's process is in nobody's place");
            assert!(is_here || owns.to, "what leaves the pod is captured");
        }
        Connect::Capture => {
            assert!(!foreign && !is_here && !owns.to, "what stays is left alone");
            assert!(asked.family && interface, "there is a route for it");
        }
        Connect::Refuse(Reason::ForeignCgroup) => assert!(foreign),
        Connect::Refuse(_) => assert!(!(asked.family && interface)),
    }
    let elsewhere = connect_elsewhere(&to, of_pod);
    assert_eq!(elsewhere == Connect::Pass, !of_pod || is_here);
    assert_ne!(elsewhere, Connect::Capture, "no route is there for it");
    let steered = steer(owns, &from, &to, port, by_lo, || begun);
    // A connection from an address to itself is the pod's own, whether the agent knows the address or not.
    if steered == Steer::App && !to.is_loopback() && from != to {
        assert!(
            owns.to && (by_lo || (owns.from && begun)),
            "nobody else reaches the app past the agent"
        );
    }
    if steered == Steer::Agent(ListenerKind::Outbound) {
        assert!(by_lo || owns.from, "only the pod asks to get out");
    }
    true
}

/// One of a few addresses, so that inputs have equal ones, or any other.
#[derive(Debug)]
struct Choice(Ip);

impl<'a> arbitrary::Arbitrary<'a> for Choice {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let octets = match bytes.arbitrary::<u8>()? {
            0 => return Ok(Self(Ip::NONE)),
            few @ 1..16 => [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, few],
            few @ 16..32 => [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, few],
            few @ 32..40 => [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, few],
            40 => [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            41 => [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
            _ => bytes.arbitrary()?,
        };
        Ok(Self(Ip::from_octets(octets)))
    }
}

/// The headers of a peer's CONNECT request.
pub fn headers(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else {
        return false;
    };
    let authority = words::authority(text);
    if let Some(address) = authority {
        assert_ne!(address.port(), 0);
        // Only one spelling of an address is accepted, up to IPv6's abbreviations.
        assert_eq!(words::authority(&address.to_string()), Some(address));
    }
    let host = words::forwarded_host(text);
    if let Some(host) = host {
        assert!(!host.is_empty() && text.contains(host));
    }
    authority.is_some() || host.is_some()
}

/// The text of an identity.
pub fn identity(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else {
        return false;
    };
    let Ok(identity) = text.parse::<Identity>() else {
        return false;
    };
    assert_eq!(identity.to_string(), text);
    let parts = [
        identity.trust_domain(),
        identity.namespace(),
        identity.service_account(),
    ];
    assert!(
        parts
            .iter()
            .all(|part| !part.is_empty() && !part.contains('/'))
    );
    true
}

/// ztunnel's local file.
pub fn local(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else {
        return false;
    };
    let made = local_xds::parse(Path::new("fuzzed"), text, "here");
    match &made {
        // Here a named policy may be missing, as the file's author named it; it refuses then.
        Ok(made) => sound(made),
        Err(error) => assert!(error.to_string().starts_with("fuzzed"), "{error}"),
    }
    made.is_ok()
}

/// A file of Kubernetes manifests, and the mesh that it is translated to.
pub fn manifests(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else {
        return false;
    };
    let objects = match Objects::parse(Path::new("fuzzed"), text) {
        Ok(objects) => objects,
        Err(error) => {
            assert!(error.to_string().starts_with("fuzzed"), "{error}");
            return false;
        }
    };
    let mesh = MeshConfig::of_node("here");
    let made = translate(&objects, &Enrolled::default(), &BTreeSet::new(), &mesh);
    sound(&made);
    let keys: BTreeSet<String> = made.policies.iter().map(|policy| policy.key()).collect();
    assert_eq!(keys.len(), made.policies.len(), "one policy of each name");
    for workload in &made.workloads {
        for key in workload.policies.iter() {
            assert!(keys.contains(&**key), "{key} is attached and not there");
        }
    }
    let here = objects.pods.values();
    let here = here.filter(|pod| *pod.body.node == *mesh.node);
    assert_eq!(
        made.local.len(),
        here.count(),
        "no pod of this node is lost"
    );
    true
}

/// The records of pods that other nodes, or earlier agents, have left.
pub fn records(input: &[u8]) -> bool {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));
    let folder = FOLDER.path();
    let hour = std::time::Duration::from_secs(3600);
    let (state, _) = SharedState::open(folder, None, "cluster.local", hour).expect("a state");
    let enrolled = enrolled::EnrolmentRecords::new(state, "here", "a machine");
    fs::write(enrolled.folder().join("ns.a.json"), input).expect("a file");
    let read = enrolled.read().expect("a folder");
    match read.problems.as_slice() {
        [] => assert!(read.own.iter().all(|pod| read.enrolled.contains(pod))),
        [told] => {
            assert!(told.contains("ns.a.json"), "{told}");
            assert!(read.own.is_empty());
            let any = PodKey {
                namespace: "ns".into(),
                name: "a".into(),
                uid: "whichever".into(),
            };
            assert!(read.enrolled.contains(&any), "it may be of this one");
        }
        more => panic!("of one file: {more:?}"),
    }
    let undo = undo::UndoRecords::open(&folder.join("pods")).expect("a folder");
    fs::write(undo.folder().join("4096.json"), input).expect("a file");
    let of_undo = undo.read(4096);
    let taken = read.problems.is_empty() || of_undo.is_ok();
    match of_undo {
        Ok(read) => {
            let mut read = read.expect("it is there");
            let written = serde_json::to_vec(&read).expect("JSON");
            let mut again: undo::UndoRecord =
                serde_json::from_slice(&written).expect("its own words");
            // Unknown fields may have numbers that differ when they are read again.
            let names = |record: &mut undo::UndoRecord| {
                let rest = std::mem::take(&mut record.rest).into_keys();
                rest.collect::<Vec<_>>()
            };
            assert_eq!(names(&mut read), names(&mut again));
            assert_eq!(read, again);
        }
        Err(error) => assert!(error.to_string().contains("4096.json"), "{error}"),
    }
    taken
}

/// A packet between the halves of the agent: what a node says, or a proxy.
pub fn seam(input: &[u8]) -> bool {
    let hello = Hello::read(input);
    if let Ok(hello) = &hello {
        let again = Hello::read(&hello.packet());
        assert_eq!(again.expect("its own words"), *hello);
    }
    let told = ProxyMessage::read(input);
    if let Ok(told) = &told {
        let again = ProxyMessage::read(&told.clone().packet());
        assert_eq!(again.expect("its own words"), *told);
    }
    let Ok(said) = NodeMessage::read(input) else {
        return hello.is_ok() || told.is_ok();
    };
    let again = NodeMessage::read(&said.clone().packet());
    assert_eq!(again.expect("its own words"), said);
    let of = match said {
        NodeMessage::Add(add) => {
            if let Ok(identity) = add.identity() {
                let who = add.workload_info.expect("it is somebody");
                let parts = [&add.trust_domain, &who.namespace, &who.service_account];
                let [domain, namespace, account] = parts;
                let text = format!("spiffe://{domain}/ns/{namespace}/sa/{account}");
                assert_eq!(text.parse().as_ref(), Ok(&identity), "no other's identity");
            }
            add.addresses
        }
        NodeMessage::Addresses(of) => of.addresses,
        _ => return true,
    };
    if let Ok(addresses) = wire::addresses(&of) {
        let bytes: Vec<_> = addresses.iter().map(wire::bytes).collect();
        assert_eq!(bytes, of);
    }
    true
}

/// Checks what must hold of every mesh.
fn sound(made: &Translation) {
    let uids: BTreeSet<_> = made
        .workloads
        .iter()
        .map(|workload| &workload.uid)
        .collect();
    assert_eq!(uids.len(), made.workloads.len(), "one workload of each uid");
    for workload in &made.workloads {
        if workload.service_account.is_empty() {
            // An address outside of the mesh.
            assert_eq!(
                workload.protocol,
                Protocol::Tcp,
                "nobody is dialled as nobody"
            );
            continue;
        }
        let text = workload.identity().to_string();
        let parsed = text.parse::<Identity>();
        assert_eq!(
            parsed.as_ref(),
            Ok(&workload.identity()),
            "no other's identity"
        );
    }
}
