//! Kernels that lack a feature: seccomp makes them appear so to a process, so that the program under test needs no
//! switch for it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A feature that a kernel lacks, or a point at which the process is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Restriction {
    /// No kernel programs of a type, by its number in `enum bpf_prog_type`.
    Programs(u32),
    /// No IPv6: no socket of its family can be created.
    Ipv6,
    /// No right to list programs.
    ListPrograms,
    /// The process is killed as it begins the step of this number, counted from 0. A step pins something,
    /// attaches a program, or renames a file.
    KillAtStep(u32),
    /// No instances of inotify: others have them all.
    Inotify,
}

/// `BPF_PROG_LOAD` of `enum bpf_cmd`.
const PROG_LOAD: u32 = 5;
/// `BPF_PROG_GET_NEXT_ID` of `enum bpf_cmd`.
const PROG_LIST: u32 = 11;
/// `BPF_OBJ_PIN`, `BPF_LINK_CREATE` and `BPF_LINK_UPDATE` of `enum bpf_cmd`.
const STEPS: [u32; 3] = [6, 28, 29];
#[cfg(target_arch = "x86_64")]
const RENAME: libc::c_long = libc::SYS_rename;
#[cfg(not(target_arch = "x86_64"))]
const RENAME: libc::c_long = libc::SYS_renameat;
/// Offsets in `seccomp_data` of the system call's number and of the lower halves of its first two arguments.
const NUMBER: u32 = 0;
const FIRST: u32 = 16;

/// Makes a command start on a kernel that appears to lack a feature.
pub fn restrict(command: &mut Command, what: Restriction) {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    let mut filter = filter(what);
    let is_asked = matches!(what, Restriction::Programs(_) | Restriction::KillAtStep(_));
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        let flags = match is_asked {
            true => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            false => 0,
        };
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program and its filter live for the length of the call.
        let made = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
        let listener = i32::try_from(nix::errno::Errno::result(made)?).unwrap_or(-1);
        if is_asked {
            // Exec closes the listener, but not before the other process has a copy.
            (&theirs).write_all(&listener.to_ne_bytes())?;
            (&theirs).write_all(&std::process::id().to_ne_bytes())?;
            (&theirs).read_exact(&mut [0])?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, with what was prepared before.
    unsafe { command.pre_exec(install) };
    if is_asked {
        std::thread::spawn(move || {
            let mut said = [0; 8];
            if ours.read_exact(&mut said).is_err() {
                return; // it was never started
            }
            let listener = i32::from_ne_bytes(said[..4].try_into().expect("four bytes"));
            let pid = i32::from_ne_bytes(said[4..].try_into().expect("four bytes"));
            let listener = taken(pid, listener).expect("the filter's listener");
            ours.write_all(&[0]).expect("it waits");
            match what {
                Restriction::Programs(kind) => answer_loads(&listener, kind),
                Restriction::KillAtStep(steps) => end_at(&listener, pid, steps),
                Restriction::Ipv6 | Restriction::ListPrograms | Restriction::Inotify => {}
            }
        });
    }
}

/// Returns the filter, which refuses the feature's system calls, or has the listener decide about them.
fn filter(what: Restriction) -> Vec<libc::sock_filter> {
    let load = |k| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, k, 0, 0);
    let is = |k, then, other| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, then, other);
    let answer = |k| step(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    let number = |call: libc::c_long| u32::try_from(call).expect("a small number");
    let (ask, allow) = (libc::SECCOMP_RET_USER_NOTIF, libc::SECCOMP_RET_ALLOW);
    let refuse = |error: i32| libc::SECCOMP_RET_ERRNO | error.cast_unsigned();
    let one = |call, first, verdict| {
        vec![
            load(NUMBER),
            is(number(call), 0, 3),
            load(FIRST),
            is(first, 0, 1),
            answer(verdict),
            answer(allow),
        ]
    };
    match what {
        Restriction::Programs(_) => one(libc::SYS_bpf, PROG_LOAD, ask),
        Restriction::Ipv6 => one(
            libc::SYS_socket,
            libc::AF_INET6.cast_unsigned(),
            refuse(libc::EAFNOSUPPORT),
        ),
        Restriction::ListPrograms => one(libc::SYS_bpf, PROG_LIST, refuse(libc::EPERM)),
        Restriction::Inotify => one(
            libc::SYS_inotify_init1,
            (libc::IN_CLOEXEC | libc::IN_NONBLOCK).cast_unsigned(),
            refuse(libc::EMFILE),
        ),
        Restriction::KillAtStep(_) => vec![
            load(NUMBER),
            is(number(RENAME), 6, 0),
            is(number(libc::SYS_bpf), 0, 4),
            load(FIRST),
            is(STEPS[0], 3, 0),
            is(STEPS[1], 2, 0),
            is(STEPS[2], 1, 0),
            answer(allow),
            answer(ask),
        ],
    }
}

fn step(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = code as u16;
    libc::sock_filter { code, jt, jf, k }
}

/// Copies a descriptor of another process.
fn taken(pid: i32, descriptor: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let process = i32::try_from(nix::errno::Errno::result(process)?).unwrap_or(-1);
    // SAFETY: the kernel has just made it for this caller alone.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    // SAFETY: takes no pointers.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) };
    let own = i32::try_from(nix::errno::Errno::result(own)?).unwrap_or(-1);
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}

/// Refuses programs of a type, as a kernel that does not know it, until no process can ask any more.
fn answer_loads(listener: &OwnedFd, kind: u32) {
    while let Some(asked) = next(listener) {
        // The attributes begin with the program's type.
        let mut found = [0; 4];
        let memory = File::open(format!("/proc/{}/mem", asked.pid));
        let read = memory.and_then(|memory| memory.read_exact_at(&mut found, asked.data.args[1]));
        let refused = read.is_ok() && u32::from_ne_bytes(found) == kind;
        answer(listener, &asked, refused.then_some(libc::EINVAL));
    }
}

/// Allows this number of steps, and kills the process instead of the next one.
fn end_at(listener: &OwnedFd, pid: i32, steps: u32) {
    for _ in 0..steps {
        let Some(asked) = next(listener) else {
            return;
        };
        answer(listener, &asked, None);
    }
    if next(listener).is_some() {
        let pid = nix::unistd::Pid::from_raw(pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

/// Waits for the next system call to decide about; `None` if no process can ask any more.
fn next(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    let request = libc::SECCOMP_IOCTL_NOTIF_RECV;
    // SAFETY: the kernel fills the structure, whose size is in the request's number.
    let done = unsafe { libc::ioctl(listener.as_raw_fd(), request, &raw mut asked) };
    (done == 0).then_some(asked)
}

/// Allows a system call, or refuses it with `error`.
fn answer(listener: &OwnedFd, asked: &libc::seccomp_notif, error: Option<i32>) {
    // SAFETY: plain numbers, for which zero is a value.
    let mut answer: libc::seccomp_notif_resp = unsafe { std::mem::zeroed() };
    answer.id = asked.id;
    match error {
        Some(error) => answer.error = -error,
        None => {
            answer.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).expect("one");
        }
    }
    let request = libc::SECCOMP_IOCTL_NOTIF_SEND;
    // SAFETY: as in `next`; it fails if the process has ended meanwhile.
    unsafe { libc::ioctl(listener.as_raw_fd(), request, &raw mut answer) };
}
