//! The folder that the nodes of a mesh share, `<state>/`: the CA (`ca/`), and the records of enrolled
//! pods (`enrolled/`, in which the file `mark` says that it is that folder).
//!
//! They are made once, the records' folder first. From then on what is not there is lost, or not mounted,
//! and says nothing: not that there is no CA yet, nor that no pod is enrolled.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;

use super::ca::{self, CaError, EmbeddedCa};
use super::ownership;
use crate::sys::made::CreatedPaths;

const RECORDS: &str = "enrolled";
const MARK: &str = "mark";

/// Why a state is not taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A part of it is not there.
    #[error(
        "{missing} is missing, as if the state were not mounted, or a part of it lost: {why}; {remedy}"
    )]
    Missing {
        /// The part.
        missing: PathBuf,
        /// Why it should be there.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// It is another mesh's.
    #[error(
        "{path}: has the SHA-256 fingerprint {found}, and {wanted} is that of the root which this node had \
         of this state: bring it back, or, for a new root, uninstall the node first"
    )]
    OtherRoot {
        /// The root.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it was.
        wanted: String,
    },
    /// Others may write to it.
    #[error(
        "{path}: {what}: whoever writes to it says which pods are dialled in clear, and whose certificates are good"
    )]
    Open {
        /// The part.
        path: PathBuf,
        /// What is wrong, and how to mend it.
        what: String,
    },
    /// Its CA cannot be opened.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A file or folder cannot be read or made.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
}

/// A state, as it was opened.
#[derive(Clone, Debug)]
pub struct SharedState {
    folder: PathBuf,
    /// The fingerprint of the CA's root.
    root: String,
}

impl SharedState {
    /// Opens it with its CA, or makes both if it was not used before. `known` is the fingerprint of the
    /// root that this node had of it, if it had one; for the rest see [`EmbeddedCa::open`].
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open(
        folder: &Path,
        known: Option<&str>,
        trust_domain: &str,
        ttl: Duration,
    ) -> Result<(Self, EmbeddedCa), StateError> {
        let records = folder.join(RECORDS);
        refuse_incomplete(folder, known)?;
        let mut made = CreatedPaths::missing(folder);
        let first = || {
            make(&records).map_err(|error| CaError::File {
                path: records.clone(),
                error,
            })
        };
        let ca = EmbeddedCa::open_after(&first, folder, trust_domain, ttl)?;
        first()?;
        made.keep();
        let state = Self::known(folder, ca.fingerprint());
        if let Some(known) = known {
            state.is(known)?;
        }
        Ok((state, ca))
    }

    /// Opens it without its CA, for a process that has no key and makes nothing. Returns none if nobody has
    /// made it yet.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open_existing(
        folder: &Path,
        known: Option<&str>,
        trust_domain: &str,
    ) -> Result<Option<Self>, StateError> {
        refuse_incomplete(folder, known)?;
        let found = Self::found(folder).map_err(of_file(&ca::root_of(folder)))?;
        if let (Some(state), Some(known)) = (&found, known) {
            state.is(known)?;
        }
        ca::refuse_other_trust_domain(folder, trust_domain)?;
        Ok(found)
    }

    /// That it is the one of which a node has known the root.
    ///
    /// # Errors
    /// It is another mesh's.
    pub fn is(&self, known: &str) -> Result<(), StateError> {
        match self.root == known {
            true => Ok(()),
            false => Err(StateError::OtherRoot {
                path: ca::root_of(&self.folder),
                found: self.root.clone(),
                wanted: known.to_owned(),
            }),
        }
    }

    /// One that was opened before, with the fingerprint of its root.
    pub fn known(folder: &Path, root: String) -> Self {
        Self {
            folder: folder.to_owned(),
            root,
        }
    }

    /// As it is there now, if it has a CA.
    ///
    /// # Errors
    /// Its root cannot be read.
    pub fn found(folder: &Path) -> io::Result<Option<Self>> {
        match ca::fingerprint_of(&ca::root_of(folder)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            root => Ok(Some(Self::known(folder, root?))),
        }
    }

    /// The fingerprint of its CA's root.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Where the records of enrolled pods are.
    pub fn records(&self) -> PathBuf {
        self.folder.join(RECORDS)
    }

    /// Whether what is there now is what was opened. If it is not, what is not in it says nothing.
    ///
    /// # Errors
    /// It is not there, or another one; a file is named.
    pub fn look(&self) -> io::Result<()> {
        let (root, mark) = (ca::root_of(&self.folder), self.records().join(MARK));
        let of = |path: &Path, what: &str| io::Error::other(format!("{}: {what}", path.display()));
        let found = ca::fingerprint_of(&root).map_err(|error| of(&root, &error.to_string()))?;
        if found != self.root {
            let what = format!(
                "is another root than at the start ({found}, not {})",
                self.root
            );
            return Err(of(&root, &what));
        }
        match is_there(&mark).map_err(|error| of(&mark, &error.to_string()))? {
            true => Ok(()),
            false => Err(of(
                &mark,
                "is missing, so this is not the folder that it was",
            )),
        }
    }
}

/// Refuses a state that others may write to, or of which a part is missing that must have been there.
fn refuse_incomplete(folder: &Path, known: Option<&str>) -> Result<(), StateError> {
    let (root, records) = (ca::root_of(folder), folder.join(RECORDS));
    for part in [folder, &folder.join("ca"), &root, &records] {
        guard(part)?;
    }
    let missing = |missing: &Path, why: String, remedy: &str| StateError::Missing {
        missing: missing.to_owned(),
        why,
        remedy: remedy.into(),
    };
    let has_records = has_records(&records).map_err(of_file(&records))?;
    if ca::is_there(folder).map_err(of_file(&root))? {
        let mark = records.join(MARK);
        // Before there were marks there were records.
        if !is_there(&mark).map_err(of_file(&mark))? && !has_records {
            let why = format!("{} is there", root.display());
            let remedy = "bring it back, or make it, empty, if no pod of the mesh is enrolled";
            return Err(missing(&mark, why, remedy));
        }
    } else if let Some(known) = known {
        let why = format!("this node had a root of it, with the SHA-256 fingerprint {known}");
        let remedy = "bring it back, or, for a new root, uninstall the node first";
        return Err(missing(&root, why, remedy));
    } else if has_records {
        let why = format!("{} has records of pods", records.display());
        let remedy = "bring it back, or, for a new root, uninstall all nodes first";
        return Err(missing(&root, why, remedy));
    }
    Ok(())
}

/// Makes the records' folder, with its mark, to the disk. Whoever finds a CA finds this as well.
fn make(records: &Path) -> io::Result<()> {
    let mark = records.join(MARK);
    if is_there(&mark)? {
        return Ok(());
    }
    let mut made = CreatedPaths::missing(records);
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(records)?;
    File::create(&mark)?.sync_all()?;
    made.keep();
    for folder in [Some(records), records.parent()].into_iter().flatten() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Refuses a part that others than root and the agent's own user may write to.
fn guard(path: &Path) -> Result<(), StateError> {
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(of_file(path))?,
    };
    match fault(&found) {
        Some(what) => Err(StateError::Open {
            path: path.to_owned(),
            what,
        }),
        None => Ok(()),
    }
}

/// What lets others than root and the agent's own user write to a part, and how to mend it.
pub(super) fn fault(part: &Metadata) -> Option<String> {
    fault_of(part.uid(), part.mode() & 0o7777, geteuid().as_raw())
}

fn fault_of(owner: u32, mode: u32, own: u32) -> Option<String> {
    ownership::fault((owner, mode), own, (0o022, "chmod go-w"))
}

fn has_records(folder: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        entries => entries?,
    };
    for entry in entries {
        if entry?
            .path()
            .extension()
            .is_some_and(|ending| ending == "json")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_there(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => found.map(|_| true),
    }
}

fn of_file(path: &Path) -> impl Fn(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    move |error| StateError::File {
        path: path.clone(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn open(state: &Path, known: Option<&str>) -> Result<SharedState, StateError> {
        SharedState::open(state, known, "td", HOUR).map(|(state, _)| state)
    }

    fn refused(state: &Path, known: Option<&str>) -> String {
        open(state, known).expect_err("not right").to_string()
    }

    #[test]
    fn what_is_lost_of_a_state_is_not_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |part: &str| folder.path().join(part);
        let state = open(folder.path(), None).expect("a state");
        let known = Some(state.root());
        state.look().expect("it is there");
        assert_eq!(
            open(folder.path(), known).expect("the same").root(),
            state.root()
        );

        let away = at("away");
        for (part, told) in [("ca", "ca/root.pem"), ("enrolled", "enrolled/mark")] {
            fs::rename(at(part), &away).expect("a folder");
            let error = state.look().expect_err("it is away").to_string();
            assert!(error.contains(told), "{error}");
            let error = refused(folder.path(), known);
            assert!(
                error.contains(&format!("{told} is missing, as if")),
                "{error}"
            );
            assert!(!at(part).exists());
            fs::rename(&away, at(part)).expect("a folder");
        }
        // A node that never had it is not to make what others know.
        fs::write(at("enrolled/ns.a.json"), "{}").expect("a file");
        fs::rename(at("ca"), &away).expect("a folder");
        assert!(refused(folder.path(), None).contains("has records of pods"));
        // A state of before there were marks.
        fs::rename(&away, at("ca")).expect("a folder");
        fs::remove_file(at("enrolled/mark")).expect("a file");
        open(folder.path(), known)
            .expect("a state")
            .look()
            .expect("a mark");
    }

    #[test]
    fn another_root_is_another_state() {
        let (one, other) = (tempfile::tempdir(), tempfile::tempdir());
        let (one, other) = (one.expect("a folder"), other.expect("a folder"));
        let known = open(one.path(), None).expect("a state").root;
        let another = open(other.path(), None).expect("a state").root;
        let error = refused(other.path(), Some(&known));
        assert!(
            error.contains(&known) && error.contains(&another),
            "{error}"
        );
        let moved = SharedState::known(other.path(), known);
        let error = moved.look().expect_err("another root").to_string();
        assert!(
            error.contains("is another root than at the start"),
            "{error}"
        );
    }

    #[test]
    fn who_has_no_key_refuses_the_state_of_another_trust_domain_too() {
        let state = tempfile::tempdir().expect("a folder");
        let existing = |domain: &str| SharedState::open_existing(state.path(), None, domain);
        assert!(
            existing("other.example")
                .expect("nobody has made it")
                .is_none()
        );
        let made = open(state.path(), None).expect("a state");
        let found = existing("td").expect("a state");
        assert_eq!(found.map(|state| state.root), Some(made.root));
        let error = existing("other.example")
            .expect_err("another mesh's")
            .to_string();
        let root = ca::root_of(state.path()).display().to_string();
        let told = format!("{root}: is the root of trust domain td, not other.example");
        assert_eq!(error, told);
    }

    #[test]
    fn a_state_that_others_may_write_to_is_refused_and_it_is_said_how_to_mend_it() {
        let state = tempfile::tempdir().expect("a folder");
        open(state.path(), None).expect("a state");
        let below = ["ca", "enrolled", "ca/root.pem"].map(|part| state.path().join(part));
        for path in below.iter().map(PathBuf::as_path).chain([state.path()]) {
            let mode = fs::metadata(path).expect("it is there").mode() & 0o777;
            let set = |mode| {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
            };
            for mode in [mode | 0o020, mode | 0o002] {
                set(mode);
                let told = format!("{}: mode {mode:o} (chmod go-w)", path.display());
                let error = refused(state.path(), None);
                assert!(error.contains(&told), "{error}");
            }
            set(mode);
        }
        open(state.path(), None).expect("as it was");
        assert_eq!(
            fault_of(0, 0o755, 0)
                .or(fault_of(7, 0o700, 7))
                .or(fault_of(0, 0o700, 7)),
            None
        );
        assert_eq!(
            fault_of(7, 0o755, 0).as_deref(),
            Some("belongs to user 7 (chown root)")
        );
    }

    #[test]
    fn nodes_that_start_together_have_one_state() {
        for _ in 0..20 {
            let state = tempfile::tempdir().expect("a folder");
            let start = std::sync::Barrier::new(8);
            let open = || {
                start.wait();
                open(state.path(), None).expect("a state").root
            };
            let roots: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
                let ends = threads.into_iter().map(|thread| thread.join());
                ends.map(|root| root.expect("a root")).collect()
            });
            assert!(roots.iter().all(|root| *root == roots[0]));
        }
    }
}
