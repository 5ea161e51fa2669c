//! Records of enrolled pods, `<state>/enrolled/<namespace>.<name>.json`. They tell the nodes that share the
//! folder what Kubernetes' annotation `ambient.istio.io/redirection` tells in a cluster. A record is written
//! last and removed first, so that nobody dials a tunnel port that does not listen.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::disk;
use super::manifests::{LocalPodSpec, PodKey, Stale};
use super::record_cache::RecordCache;
use super::state::{self, SharedState};
use crate::proxy::identity;
use crate::sys::regular_file;

/// Ending of the file in which a record is written before it is renamed.
pub const UNFINISHED: &str = "new";
/// Longest file name that file systems take, in bytes.
const MAX_FILE_NAME: usize = 255;

/// The pods that can be dialled by HBONE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolled {
    pods: BTreeSet<PodKey>,
    /// Names of files that cannot be read. A pod that such a file may be about counts as enrolled: to dial it
    /// by HBONE is to fail closed.
    unreadable: BTreeSet<String>,
}

impl Enrolled {
    /// Returns true if a pod is enrolled.
    pub fn contains(&self, pod: &PodKey) -> bool {
        self.pods.contains(pod)
            || self
                .unreadable
                .contains(&file_of(&pod.namespace, &pod.name))
    }

    /// Marks as stale the pods that are in only one of the two.
    pub(super) fn differ(&self, other: &Self, stale: &mut Stale) {
        if self.unreadable != other.unreadable {
            *stale = Stale::all();
        }
        for pod in self.pods.symmetric_difference(&other.pods) {
            stale.pod(&pod.namespace, &pod.name);
        }
    }
}

impl FromIterator<PodKey> for Enrolled {
    fn from_iter<T: IntoIterator<Item = PodKey>>(pods: T) -> Self {
        Self {
            pods: pods.into_iter().collect(),
            unreadable: BTreeSet::new(),
        }
    }
}

/// The content of all records, as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordsSnapshot {
    /// The enrolled pods of all nodes.
    pub enrolled: Enrolled,
    /// The records of this node.
    pub own: BTreeSet<PodKey>,
    /// Those of them that do not name the machine that wrote them. Earlier versions wrote such records.
    pub unsigned: BTreeSet<PodKey>,
    /// The records that a node of the same name wrote on another machine.
    pub namesakes: BTreeSet<PodKey>,
    /// The records that cannot be read, and why.
    pub problems: Vec<String>,
    /// How many times this process had written or removed a record before the read began.
    pub writes: u64,
}

impl RecordsSnapshot {
    /// Adds the content of the record with this file name.
    pub(super) fn add(&mut self, name: &OsStr, content: &Content) {
        let (pod, author) = match content {
            Content::Enrolled(pod, author) => (pod, author),
            Content::Unreadable(why) => {
                let name = name.to_string_lossy().into_owned();
                self.enrolled.unreadable.insert(name);
                return self.problems.push(why.clone());
            }
        };
        let of_this_name = match author {
            Author::Own => Some(&mut self.own),
            Author::Unsigned => {
                self.unsigned.insert(pod.clone());
                Some(&mut self.own)
            }
            Author::Namesakes => Some(&mut self.namesakes),
            Author::Others => None,
        };
        of_this_name.map(|pods| pods.insert(pod.clone()));
        self.enrolled.pods.insert(pod.clone());
    }
}

/// The folder of records, as this node reads and writes it.
#[derive(Clone, Debug)]
pub struct EnrolmentRecords {
    state: SharedState,
    folder: PathBuf,
    node: String,
    machine: String,
    writes: Arc<AtomicU64>,
}

/// The content of a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A pod is enrolled.
    Enrolled(PodKey, Author),
    /// The record cannot be read: the problem.
    Unreadable(String),
}

/// The author of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Author {
    /// This node.
    Own,
    /// This node, without the name of its machine.
    Unsigned,
    /// A node of the same name, on another machine.
    Namesakes,
    /// Another node.
    Others,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EnrolmentRecord {
    namespace: Arc<str>,
    name: Arc<str>,
    uid: Arc<str>,
    node: String,
    /// Hash that identifies the machine; empty in records of earlier versions.
    #[serde(default)]
    machine: String,
    addresses: Vec<IpAddr>,
}

impl EnrolmentRecords {
    /// Creates the records of a shared state for this node. `machine` is the text that identifies this
    /// machine; records have a hash of it.
    pub fn new(state: SharedState, node: &str, machine: &str) -> Self {
        Self {
            folder: state.records(),
            state,
            node: node.to_owned(),
            // Readers of a record are not to learn the machine's own identifiers.
            machine: identity::sha256(machine.as_bytes())
                .chars()
                .take(16)
                .collect(),
            writes: Arc::default(),
        }
    }

    /// The path of the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Checks that the state is the one that was opened.
    ///
    /// # Errors
    /// It is not there, or it is another one.
    pub(super) fn look(&self) -> io::Result<()> {
        self.state.look()
    }

    /// Reads all records.
    ///
    /// # Errors
    /// The folder cannot be read, or the state is not the one that was opened.
    pub fn read(&self) -> io::Result<RecordsSnapshot> {
        let mut cache = RecordCache::new(self.clone());
        cache.look(SystemTime::now())?;
        Ok(RecordsSnapshot::clone(cache.said()))
    }

    /// Reads one record. Returns `None` if the file is gone.
    pub(super) fn content(&self, path: &Path) -> Option<Content> {
        match read(path) {
            Ok(record) => {
                let author = match (self.is_own(&record), record.node == self.node) {
                    (true, _) if record.machine.is_empty() => Author::Unsigned,
                    (true, _) => Author::Own,
                    (false, true) => Author::Namesakes,
                    (false, false) => Author::Others,
                };
                Some(Content::Enrolled(key(&record), author))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Content::Unreadable(format!(
                "{}; its pod counts as enrolled",
                with_path(path, &error)
            ))),
        }
    }

    /// Returns how many times this process has written or removed a record.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Acquire)
    }

    /// Writes a pod's record: it can be dialled by HBONE from now on.
    ///
    /// # Errors
    /// The record cannot be written, or the state is not the one that was opened. The error names the file.
    pub fn write(&self, pod: &LocalPodSpec) -> io::Result<()> {
        let record = EnrolmentRecord {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.pod_uid.clone(),
            node: self.node.clone(),
            machine: self.machine.clone(),
            addresses: pod.addresses.clone(),
        };
        let path = self.path(&record.namespace, &record.name);
        let new = self.unfinished();
        self.state.look()?;
        let write = || {
            // What is there, such as what a crash has left, is replaced, and not written to.
            let _ = fs::remove_file(&new);
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o644);
            let mut file = options.open(&new)?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            self.sync()
        };
        let written = write();
        self.writes.fetch_add(1, Ordering::Release);
        written.map_err(|error| {
            let _ = fs::remove_file(&new);
            with_path(&path, &error)
        })
    }

    /// Removes a pod's record: it cannot be dialled by HBONE any more. A record of another node or machine
    /// stays.
    ///
    /// # Errors
    /// The record cannot be removed, or the state is not the one that was opened. The error names the file.
    pub fn remove(&self, pod: &PodKey) -> io::Result<()> {
        self.state.look()?;
        let path = self.path(&pod.namespace, &pod.name);
        let removed = match read(&path) {
            Ok(record) if self.is_own(&record) && key(&record) == *pod => {
                fs::remove_file(&path).and_then(|()| self.sync())
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        self.writes.fetch_add(1, Ordering::Release);
        removed.map_err(|error| with_path(&path, &error))
    }

    /// Removes all records of this node. Returns how many there were.
    ///
    /// # Errors
    /// The folder cannot be read, or a record cannot be removed.
    pub fn withdraw(&self) -> io::Result<usize> {
        let own = self.read()?.own;
        own.iter().try_for_each(|pod| self.remove(pod))?;
        match fs::remove_file(self.unfinished()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(own.len()),
        }
    }

    /// Returns true if this node may remove a record. One that names no machine is of an earlier version.
    fn is_own(&self, record: &EnrolmentRecord) -> bool {
        record.node == self.node && (record.machine.is_empty() || record.machine == self.machine)
    }

    /// The path of a pod's record.
    pub fn path_of(&self, pod: &PodKey) -> PathBuf {
        self.path(&pod.namespace, &pod.name)
    }

    fn path(&self, namespace: &str, name: &str) -> PathBuf {
        self.folder.join(file_of(namespace, name))
    }

    /// Path at which this node writes a record before it is renamed. Each node has its own, so that two which
    /// write about the same pod do not collide; what a crash leaves is replaced.
    pub fn unfinished(&self) -> PathBuf {
        let stem = format!("{}.{}", self.node, self.machine);
        self.folder.join(file_name(&stem, UNFINISHED))
    }

    /// Flushes the folder's entries to disk.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }
}

/// Returns the file name of a pod's record. It is unambiguous since namespaces have no dots.
fn file_of(namespace: &str, name: &str) -> String {
    file_name(&format!("{namespace}.{name}"), "json")
}

/// Returns a file name. A stem that is too long is replaced by its hash, after a prefix that no object's name
/// has.
fn file_name(stem: &str, ending: &str) -> String {
    match stem.len() + 1 + ending.len() <= MAX_FILE_NAME {
        true => format!("{stem}.{ending}"),
        false => format!("sha256_{}.{ending}", identity::sha256(stem.as_bytes())),
    }
}

/// Returns the error with the name of the file.
pub(super) fn with_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn read(path: &Path) -> io::Result<EnrolmentRecord> {
    let (mut file, mut text) = (regular_file::open(path)?, Vec::new());
    if let Some(fault) = state::fault(&file.metadata()?) {
        return Err(io::Error::other(fault));
    }
    file.read_to_end(&mut text)?;
    disk::answered();
    let record: EnrolmentRecord = serde_json::from_slice(&text)?;
    match path.ends_with(file_of(&record.namespace, &record.name)) {
        true => Ok(record),
        false => Err(io::Error::other(format!(
            "is of pod {}/{}, which its name does not say",
            record.namespace, record.name
        ))),
    }
}

fn key(record: &EnrolmentRecord) -> PodKey {
    PodKey {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        uid: record.uid.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::manifests::Wanted;
    use super::*;

    /// Opens the records of a state, which is made if it does not exist.
    pub(crate) fn records(state: &Path, node: &str) -> EnrolmentRecords {
        of_machine(state, node, "a machine")
    }

    /// Opens the records for another machine.
    pub(crate) fn of_machine(state: &Path, node: &str, machine: &str) -> EnrolmentRecords {
        let hour = std::time::Duration::from_secs(3600);
        let (state, _) = SharedState::open(state, None, "cluster.local", hour).expect("a state");
        EnrolmentRecords::new(state, node, machine)
    }

    pub(crate) fn pod(name: &str, uid: &str) -> LocalPodSpec {
        LocalPodSpec {
            uid: format!("c//Pod/ns/{name}").into(),
            pod_uid: uid.into(),
            config_hash: None,
            namespace: "ns".into(),
            name: name.into(),
            service_account: "default".into(),
            trust_domain: "cluster.local".into(),
            addresses: vec![IpAddr::from([10, 0, 0, 1])],
            netns_path: None,
            wanted: Wanted::Yes,
        }
    }

    pub(crate) fn key_of(name: &str, uid: &str) -> PodKey {
        PodKey {
            namespace: "ns".into(),
            name: name.into(),
            uid: uid.into(),
        }
    }

    #[test]
    fn each_node_sees_all_and_removes_its_own() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let (one, two) = (records(state.path(), "one"), records(state.path(), "two"));
        one.write(&pod("a", "1"))?;
        two.write(&pod("b", ""))?;
        let read = || Ok::<_, io::Error>(one.read()?.enrolled);
        let all = |keys: [(&str, &str); 2]| keys.map(|(name, uid)| key_of(name, uid));
        assert_eq!(read()?, Enrolled::from_iter(all([("a", "1"), ("b", "")])));
        assert_eq!(one.read()?.own, [key_of("a", "1")].into());
        two.remove(&key_of("a", "1"))?;
        one.remove(&key_of("a", "2"))?;
        assert_eq!(read()?, Enrolled::from_iter(all([("a", "1"), ("b", "")])));
        // The pod has moved: the old node's removal must not take the new node's record.
        two.write(&pod("a", "3"))?;
        one.remove(&key_of("a", "1"))?;
        assert_eq!(read()?, Enrolled::from_iter(all([("a", "3"), ("b", "")])));
        two.remove(&key_of("a", "3"))?;
        assert_eq!(read()?, Enrolled::from_iter([key_of("b", "")]));
        Ok(())
    }

    #[test]
    fn what_a_node_of_the_same_name_wrote_on_another_machine_stays() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let [here, there] = ["here", "there"].map(|at| of_machine(state.path(), "one", at));
        there.write(&pod("a", "1"))?;
        here.write(&pod("b", ""))?;
        let said = here.read()?;
        assert_eq!(said.own, [key_of("b", "")].into());
        assert_eq!(said.namesakes, [key_of("a", "1")].into());
        assert!(said.enrolled.contains(&key_of("a", "1")));
        here.remove(&key_of("a", "1"))?;
        assert_eq!(here.withdraw()?, 1);
        assert_eq!(there.read()?.own, [key_of("a", "1")].into());
        // After a boot nothing else is left of it.
        let again = of_machine(state.path(), "one", "there");
        assert_eq!(again.withdraw()?, 1);
        assert_eq!(again.read()?.enrolled, Enrolled::default());
        assert_ne!(here.unfinished(), there.unfinished());
        Ok(())
    }

    #[test]
    fn a_record_that_names_no_machine_is_its_nodes() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        let text = r#"{"namespace":"ns","name":"a","uid":"","node":"one","addresses":[]}"#;
        fs::write(records.path("ns", "a"), text)?;
        let said = records.read()?;
        assert_eq!((&said.own, said.own.len()), (&said.unsigned, 1));
        assert_eq!(records.withdraw()?, 1);
        Ok(())
    }

    #[test]
    fn a_record_that_others_may_write_to_counts_as_one_that_cannot_be_read() -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        records.write(&pod("a", "1"))?;
        let path = records.path("ns", "a");
        for mode in [0o664, 0o646] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            let said = records.read()?;
            let told = format!("ns.a.json: mode {mode:o} (chmod go-w)");
            assert!(said.problems[0].contains(&told), "{said:?}");
            // Who wrote to it may have named another pod.
            assert!(said.enrolled.contains(&key_of("a", "2")) && said.own.is_empty());
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        assert_eq!(records.read()?.problems.len(), 0);
        Ok(())
    }

    #[test]
    fn what_is_no_file_counts_as_a_record_that_cannot_be_read() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        let path = records.path("ns", "a");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
        let (read, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || read.send((records.read(), records.remove(&key_of("a", "")))));
        let answer = said.recv_timeout(std::time::Duration::from_secs(5));
        let (said, removed) = answer.expect("it waits for nobody");
        let (said, why) = (said?, removed.expect_err("not a record").to_string());
        assert!(said.enrolled.contains(&key_of("a", "")) && said.own.is_empty());
        for told in [&said.problems[0], &why] {
            assert!(told.contains("ns.a.json: is not a regular file"), "{told}");
        }
        Ok(())
    }

    #[test]
    fn what_is_where_a_record_is_written_first_is_replaced_and_not_written_to() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        let precious = state.path().join("precious");
        fs::write(&precious, "text")?;
        std::os::unix::fs::symlink(&precious, records.unfinished())?;
        records.write(&pod("a", "1"))?;
        assert_eq!(fs::read_to_string(&precious)?, "text");
        assert_eq!(records.read()?.own, [key_of("a", "1")].into());
        Ok(())
    }

    #[test]
    fn what_is_being_written_is_no_record_and_goes_with_its_node() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        let (own, others) = (records.unfinished(), records.folder().join("two.new"));
        fs::write(&own, "{")?;
        fs::write(&others, "{")?;
        let read = records.read()?;
        assert_eq!(
            (read.enrolled, read.problems.len()),
            (Enrolled::default(), 0)
        );
        records.write(&pod("a", ""))?;
        assert!(!own.exists() && others.exists());
        fs::write(&own, "{")?;
        assert_eq!(records.withdraw()?, 1);
        assert!(!own.exists() && others.exists());
        Ok(())
    }

    #[test]
    fn a_record_is_of_the_pod_that_its_file_is_named_after() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = records(state.path(), "one");
        records.write(&pod("a", ""))?;
        fs::rename(records.path("ns", "a"), records.path("ns", "b"))?;
        let read = records.read()?;
        assert!(!read.enrolled.contains(&key_of("a", "")) && read.own.is_empty());
        assert!(read.enrolled.contains(&key_of("b", "")));
        assert!(
            read.problems[0].contains("ns.b.json: is of pod ns/a"),
            "{read:?}"
        );
        Ok(())
    }

    #[test]
    fn a_record_of_the_longest_names_is_written_and_is_no_other_pods() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let node = "n".repeat(253);
        let records = records(state.path(), &node);
        let long = ["a", "b"].map(|last| pod(&("x".repeat(252) + last), "1"));
        for pod in &long {
            records.write(pod)?;
        }
        let key = |pod: &LocalPodSpec| key_of(&pod.name, "1");
        assert!(long.iter().all(|pod| {
            records
                .read()
                .is_ok_and(|read| read.enrolled.contains(&key(pod)))
        }));
        records.remove(&key(&long[0]))?;
        let read = records.read()?;
        assert_eq!(read.problems.len(), 0, "{read:?}");
        assert_eq!(read.enrolled, Enrolled::from_iter([key(&long[1])]));
        Ok(())
    }

    #[test]
    fn nodes_that_write_of_the_same_pod_at_once_never_have_half_of_a_record_read() -> io::Result<()>
    {
        let state = tempfile::tempdir()?;
        let nodes = ["one", "two"].map(|node| records(state.path(), node));
        std::thread::scope(|scope| {
            let writers = nodes.map(|records| {
                scope.spawn(move || (0..200).try_for_each(|_| records.write(&pod("a", "1"))))
            });
            let records = records(state.path(), "three");
            while !writers.iter().all(|writer| writer.is_finished()) {
                let problems = records.read()?.problems;
                assert_eq!(problems.len(), 0, "{problems:?}");
            }
            writers
                .into_iter()
                .try_for_each(|writer| writer.join().expect("no panic"))
        })
    }
}
