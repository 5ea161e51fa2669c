//! Records of enrolled pods, `<state>/enrolled/<namespace>.<name>.json`: what Kubernetes' annotation
//! `ambient.istio.io/redirection` says to other nodes, these say to those that share the folder. One
//! is written last and removed first, so that nobody dials a tunnel port that does not listen.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::manifests::{Enrolled, LocalPodSpec, PodKey};

/// What a record's file ends in while it is written.
pub const UNFINISHED: &str = "new";

/// The folder.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
    node: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    namespace: Arc<str>,
    name: Arc<str>,
    uid: Arc<str>,
    node: String,
    addresses: Vec<IpAddr>,
}

impl Records {
    /// Of a mesh's state, as this node writes them.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(state: &Path, node: &str) -> io::Result<Self> {
        let folder = state.join("enrolled");
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            node: node.to_owned(),
        })
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The enrolled pods of all nodes.
    ///
    /// # Errors
    /// One cannot be read. To go on without it would be to dial its pod in clear.
    pub fn read(&self) -> io::Result<Enrolled> {
        Ok(self.all()?.iter().map(key).collect())
    }

    /// Those that this node wrote. What cannot be read is not one of them: other nodes' files do
    /// not keep this one from saying which pods it has.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn own(&self) -> io::Result<Enrolled> {
        let readable = self.each()?.into_iter().filter_map(Result::ok);
        let own = readable.filter(|record| record.node == self.node);
        Ok(own.map(|record| key(&record)).collect())
    }

    /// Says that a pod can be dialled.
    ///
    /// # Errors
    /// It cannot be written; the file is named.
    pub fn write(&self, pod: &LocalPodSpec) -> io::Result<()> {
        let record = Record {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.pod_uid.clone(),
            node: self.node.clone(),
            addresses: pod.addresses.clone(),
        };
        let path = self.path(&record.namespace, &record.name);
        let new = path.with_extension(UNFINISHED);
        let write = || {
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            of_file(&path, &error)
        })
    }

    /// Says that it cannot any more. A record that another node has written since stays.
    ///
    /// # Errors
    /// It cannot be removed; the file is named.
    pub fn remove(&self, pod: &PodKey) -> io::Result<()> {
        let path = self.path(&pod.namespace, &pod.name);
        let removed = match read(&path) {
            Ok(record) if record.node == self.node && key(&record) == *pod => {
                fs::remove_file(&path)
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(|error| of_file(&path, &error))
    }

    fn all(&self) -> io::Result<Vec<Record>> {
        self.each()?.into_iter().collect()
    }

    fn each(&self) -> io::Result<Vec<io::Result<Record>>> {
        let mut all = Vec::new();
        let listed = fs::read_dir(&self.folder).map_err(|error| of_file(&self.folder, &error))?;
        for entry in listed {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue; // one that is being written
            }
            match read(&path) {
                Ok(record) => all.push(Ok(record)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => all.push(Err(of_file(&path, &error))),
            }
        }
        Ok(all)
    }

    fn path(&self, namespace: &str, name: &str) -> PathBuf {
        self.folder.join(format!("{namespace}.{name}.json"))
    }
}

fn of_file(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn read(path: &Path) -> io::Result<Record> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn key(record: &Record) -> PodKey {
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
        let (one, two) = (
            Records::open(state.path(), "one")?,
            Records::open(state.path(), "two")?,
        );
        one.write(&pod("a", "1"))?;
        two.write(&pod("b", ""))?;
        assert_eq!(one.read()?, [key_of("a", "1"), key_of("b", "")].into());
        assert_eq!(one.own()?, [key_of("a", "1")].into());
        two.remove(&key_of("a", "1"))?;
        one.remove(&key_of("a", "2"))?;
        assert_eq!(two.read()?.len(), 2);
        // The pod has moved: the old node's removal must not take the new node's record.
        two.write(&pod("a", "3"))?;
        one.remove(&key_of("a", "1"))?;
        assert_eq!(one.read()?, [key_of("a", "3"), key_of("b", "")].into());
        two.remove(&key_of("a", "3"))?;
        assert_eq!(one.read()?, [key_of("b", "")].into());
        Ok(())
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_not_no_record() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let records = Records::open(state.path(), "one")?;
        fs::write(records.folder().join("ns.b.new"), "{")?;
        assert!(records.read()?.is_empty());
        fs::write(records.folder().join("ns.a.json"), "{")?;
        let error = records.read().expect_err("half a record");
        assert!(error.to_string().contains("ns.a.json"), "{error}");
        Ok(())
    }
}
