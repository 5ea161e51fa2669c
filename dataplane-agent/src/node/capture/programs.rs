//! Loads the kernel programs, attaches and pins them, and takes over what a predecessor pinned.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError};
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, Program, ProgramError,
    SkLookup, SockOps,
};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};

use super::CaptureError;
use super::link::Link;
use super::maps::{self, chain};
use super::pins::Pins;
use super::takeover::Takeover;
use crate::seam::Listeners;
use crate::sys::netns::Netns;
use crate::sys::{hooks, verifier};

/// The object of the node's programs.
pub static NODE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/node"));
/// The object of a pod's program.
pub static POD: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pod"));

/// Programs that are attached once per node, to the cgroup that holds the pods.
pub const NODE_PROGRAMS: [&str; 4] = ["connect4", "connect6", "egress", "sock_ops"];
/// The program that is attached in each pod's network namespace.
pub const POD_PROGRAM: &str = "steer";

/// Loads programs whose shared maps are pinned.
pub struct Loader {
    loader: EbpfLoader<'static>,
}

/// The links that keep the node's programs attached, by the programs' names, wherever they are pinned.
pub type Links = BTreeMap<&'static str, Link>;

/// One pod's program. Dropping it detaches it, unless it is pinned.
#[derive(Debug)]
pub struct PodProgram {
    ebpf: Ebpf,
    link: Option<Link>,
}

impl Loader {
    /// Creates a loader with maps pinned in these folders: existing pins are used, missing maps are made.
    pub fn new(pins: &Pins) -> Self {
        Self::at(|name| pins.maps().join(name))
    }

    /// Creates a loader for a takeover, which also takes pods' listeners from a pin.
    pub fn taking_over(takeover: &Takeover) -> Self {
        let mut own = Self::at(|name| takeover.path(name));
        let listeners = takeover.listeners();
        own.loader.map_pin_path(maps::LISTENERS, listeners);
        own
    }

    fn at(path: impl Fn(&str) -> PathBuf) -> Self {
        let mut loader = EbpfLoader::new();
        for name in maps::SHARED.into_iter().chain(maps::NODE_MAPS) {
            loader.map_pin_path(name, path(name));
        }
        Self { loader }
    }

    /// Loads the node's programs; their maps can be taken from the result.
    ///
    /// # Errors
    /// The kernel refuses a program; this build has none.
    pub fn node(&mut self) -> Result<Ebpf, CaptureError> {
        let mut ebpf = self.load("node", NODE)?;
        for name in NODE_PROGRAMS {
            let program = program(&mut ebpf, name)?;
            match program {
                Program::CgroupSockAddr(program) => program.load(),
                Program::CgroupSkb(program) => program.load(),
                Program::SockOps(program) => program.load(),
                _ => return Err(not_its_kind(name)),
            }
            .map_err(refused(name))?;
        }
        Ok(ebpf)
    }

    /// Loads a pod's program, and writes to it which pod it is for. Without listeners it lets nobody in or out.
    ///
    /// # Errors
    /// As [`Loader::node`].
    pub fn pod(
        &mut self,
        cookie: u64,
        first: Option<IpAddr>,
        listeners: Option<&Listeners>,
    ) -> Result<PodProgram, CaptureError> {
        let mut ebpf = self.load("pod", POD)?;
        // This order matters: the program names its maps by descriptors, which `fill_pod` closes.
        steer(&mut ebpf)?.load().map_err(refused(POD_PROGRAM))?;
        maps::fill_pod(&mut ebpf, cookie, first, listeners)?;
        Ok(PodProgram { ebpf, link: None })
    }

    fn load(&mut self, object: &'static str, bytes: &[u8]) -> Result<Ebpf, CaptureError> {
        if bytes.is_empty() {
            return Err(CaptureError::NoObject(object));
        }
        self.loader
            .load(bytes)
            .map_err(|error: EbpfError| CaptureError::Program {
                program: object,
                why: chain(&error),
            })
    }
}

/// Attaches the node's programs to a cgroup where they are not attached, and pins their links where they are
/// not pinned, replacing a predecessor's pins. An error of one does not keep the others from it.
///
/// # Errors
/// The cgroup does not exist; the kernel does not say what is attached to it.
pub fn restore(
    ebpf: &mut Ebpf,
    cgroup: &Path,
    pins: &Pins,
    links: &mut Links,
) -> Result<Restored, CaptureError> {
    let folder = File::open(cgroup).map_err(CaptureError::file(cgroup))?;
    let attached = hooks::of_cgroup(&folder).map_err(CaptureError::file(cgroup))?;
    let mut all = Restored {
        lost: false,
        whole: Ok(()),
    };
    for name in NODE_PROGRAMS {
        let own = links.get(name);
        let is_attached = own.is_some_and(|link| attached.contains(&link.program()));
        if !is_attached {
            match attach_one(ebpf, name, &folder) {
                Ok(link) => links.insert(name, link),
                Err(error) => {
                    all.whole = all.whole.and(Err(error));
                    continue;
                }
            };
        }
        if let Some(link) = links.get(name) {
            let one = Restored::of(link, is_attached, &pins.links().join(name));
            all.lost |= one.lost;
            all.whole = all.whole.and(one.whole);
        }
    }
    Ok(all)
}

fn attach_one(ebpf: &mut Ebpf, name: &'static str, cgroup: &File) -> Result<Link, CaptureError> {
    // No flag is needed: a link always lets other programs on the same hook run too.
    let mode = CgroupAttachMode::Single;
    let link = match program(ebpf, name)? {
        Program::CgroupSockAddr(program) => {
            let link = CgroupSockAddr::attach(program, cgroup, mode);
            let link = link
                .and_then(|link| program.take_link(link))
                .map_err(refused(name))?;
            FdLink::try_from(link)
        }
        Program::CgroupSkb(program) => {
            let link = CgroupSkb::attach(program, cgroup, CgroupSkbAttachType::Egress, mode);
            let link = link
                .and_then(|link| program.take_link(link))
                .map_err(refused(name))?;
            FdLink::try_from(link)
        }
        Program::SockOps(program) => {
            let link = SockOps::attach(program, cgroup, mode);
            let link = link
                .and_then(|link| program.take_link(link))
                .map_err(refused(name))?;
            FdLink::try_from(link)
        }
        _ => return Err(not_its_kind(name)),
    };
    let link = link.map_err(|error: LinkError| CaptureError::Program {
        program: name,
        why: format!(
            "its link cannot be pinned (kernel older than 5.7): {}",
            chain(&error)
        ),
    })?;
    Link::of(name, &link)
}

/// The result of attaching and pinning programs.
#[derive(Debug)]
pub struct Restored {
    /// `true` if one was not attached or not pinned, and is now.
    pub lost: bool,
    /// The error if a link is not pinned: its program stays attached only while this agent runs. For the
    /// node's programs also the error if one is not attached.
    pub whole: Result<(), CaptureError>,
}

impl Restored {
    /// Pins a link if it is not pinned; `attached` says whether its program was attached before.
    pub fn of(link: &Link, attached: bool, pin: &Path) -> Self {
        let was_pinned = link.is_at(pin);
        let whole = match was_pinned {
            true => Ok(()),
            false => link.pin(pin),
        };
        Self {
            lost: !attached || (!was_pinned && whole.is_ok()),
            whole,
        }
    }
}

impl PodProgram {
    /// Attaches the program in the pod's network namespace, in place of a predecessor's, and pins it.
    ///
    /// # Errors
    /// The kernel refuses; if only pinning fails the program stays attached.
    pub fn attach(&mut self, netns: &Netns, pin: &Path) -> Result<(), CaptureError> {
        self.attach_unpinned(netns)?.pin(pin)
    }

    fn attach_unpinned(&mut self, netns: &Netns) -> Result<&Link, CaptureError> {
        let program = steer(&mut self.ebpf)?;
        let link = program.attach(netns).map_err(refused(POD_PROGRAM))?;
        let link = program.take_link(link).map_err(refused(POD_PROGRAM))?;
        Ok(self.link.insert(Link::of(POD_PROGRAM, &link.into())?))
    }

    /// Replaces the program that a link attaches by this one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn replace(&mut self, link: &Link) -> Result<(), CaptureError> {
        let program = steer(&mut self.ebpf)?.fd().map_err(refused(POD_PROGRAM))?;
        link.replace(program)
            .map_err(|error| CaptureError::Program {
                program: POD_PROGRAM,
                why: error.to_string(),
            })
    }

    /// Attaches the program again if it is not attached, and pins its link if it is not pinned.
    ///
    /// # Errors
    /// The program cannot be attached; the kernel does not say whether it is.
    pub fn restore(&mut self, netns: &Netns, pin: &Path) -> Result<Restored, CaptureError> {
        let attached = is_attached(netns, self.id())?;
        let link = match &self.link {
            Some(link) if attached => link,
            _ => self.attach_unpinned(netns)?,
        };
        Ok(Restored::of(link, attached, pin))
    }

    /// Returns the id of the program once it is attached.
    pub fn id(&self) -> Option<u32> {
        self.link.as_ref().map(Link::program)
    }

    /// Returns the link, and drops the rest.
    pub fn into_link(self) -> Option<Link> {
        self.link
    }

    /// Returns the loaded object.
    pub fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }
}

/// Returns `true` if this program is attached in a network namespace.
///
/// # Errors
/// The kernel does not say.
pub fn is_attached(netns: &Netns, program: Option<u32>) -> Result<bool, CaptureError> {
    let all = hooks::of_netns(netns).map_err(|error| CaptureError::Namespace {
        what: "ask for the programs",
        why: error.to_string(),
    })?;
    Ok(program.is_some_and(|program| all.contains(&program)))
}

fn steer(ebpf: &mut Ebpf) -> Result<&mut SkLookup, CaptureError> {
    program(ebpf, POD_PROGRAM)?
        .try_into()
        .map_err(refused(POD_PROGRAM))
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, CaptureError> {
    ebpf.program_mut(name).ok_or(CaptureError::Program {
        program: name,
        why: "is not in the object".into(),
    })
}

fn refused(program: &'static str) -> impl FnOnce(ProgramError) -> CaptureError {
    move |error| {
        let why = match &error {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } => {
                let log = verifier_log.to_string();
                match verifier::verdict(&log) {
                    Some(verdict) => {
                        // The whole log is long, and of use only to authors of the program.
                        for line in log.lines() {
                            tracing::debug!("the verifier on {program}: {line}");
                        }
                        format!("{io_error}: {verdict}")
                    }
                    // The kernel refused it before the verifier ran.
                    None if io_error.raw_os_error() == Some(libc::EINVAL) => {
                        "this kernel does not have programs of its kind".into()
                    }
                    None => io_error.to_string(),
                }
            }
            ProgramError::SyscallError(call)
                if call.io_error.kind() == io::ErrorKind::PermissionDenied =>
            {
                "permission denied: capabilities are missing (see `dataplane check`)".into()
            }
            error => chain(error),
        };
        CaptureError::Program { program, why }
    }
}

fn not_its_kind(program: &'static str) -> CaptureError {
    CaptureError::Program {
        program,
        why: "is not of its kind".into(),
    }
}
