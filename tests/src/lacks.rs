//! Kernels that lack something, as a process sees them: by seccomp, so that the program under test
//! needs no switch for it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What a kernel lacks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lacks {
    /// A kind of kernel programs, by its number in `enum bpf_prog_type`.
    Programs(u32),
    /// IPv6: no socket of its family can be made.
    Ipv6,
}

/// `BPF_PROG_LOAD` of `enum bpf_cmd`.
const PROG_LOAD: u32 = 5;
/// Where the system call's number and its first two arguments' lower halves are in `seccomp_data`.
const NUMBER: u32 = 0;
const FIRST: u32 = 16;

/// Starts what the command starts on a kernel that lacks this.
pub fn lacks(command: &mut Command, what: Lacks) {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    let (call, first, verdict) = match what {
        Lacks::Programs(_) => (libc::SYS_bpf, PROG_LOAD, libc::SECCOMP_RET_USER_NOTIF),
        Lacks::Ipv6 => (
            libc::SYS_socket,
            libc::AF_INET6.cast_unsigned(),
            libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT.cast_unsigned(),
        ),
    };
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let answer = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(load, NUMBER, 0, 0),
        step(equal, u32::try_from(call).expect("a small number"), 0, 3),
        step(load, FIRST, 0, 0),
        step(equal, first, 0, 1),
        step(answer, verdict, 0, 0),
        step(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: 6,
            filter: filter.as_mut_ptr(),
        };
        let flags = match what {
            Lacks::Programs(_) => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            Lacks::Ipv6 => 0,
        };
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program and its filter live for the length of the call.
        let made = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
        let listener = i32::try_from(nix::errno::Errno::result(made)?).unwrap_or(-1);
        if matches!(what, Lacks::Programs(_)) {
            // It is closed by exec: not before somebody else has it.
            (&theirs).write_all(&listener.to_ne_bytes())?;
            (&theirs).write_all(&std::process::id().to_ne_bytes())?;
            (&theirs).read_exact(&mut [0])?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, with what was prepared before.
    unsafe { command.pre_exec(install) };
    if let Lacks::Programs(kind) = what {
        std::thread::spawn(move || {
            let mut said = [0; 8];
            if ours.read_exact(&mut said).is_err() {
                return; // it was never started
            }
            let listener = i32::from_ne_bytes(said[..4].try_into().expect("four bytes"));
            let pid = i32::from_ne_bytes(said[4..].try_into().expect("four bytes"));
            let listener = taken(pid, listener).expect("the filter's listener");
            ours.write_all(&[0]).expect("it waits");
            answer_loads(&listener, kind);
        });
    }
}

/// Another process's descriptor.
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

/// Refuses programs of a kind as a kernel does that does not know it, for as long as somebody may ask.
fn answer_loads(listener: &OwnedFd, kind: u32) {
    loop {
        // SAFETY: plain numbers, for which zero is a value.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let request = libc::SECCOMP_IOCTL_NOTIF_RECV;
        // SAFETY: the kernel fills the structure, whose size is in the request's number.
        if unsafe { libc::ioctl(listener.as_raw_fd(), request, &raw mut asked) } != 0 {
            return;
        }
        // The attributes begin with the program's kind.
        let mut found = [0; 4];
        let memory = File::open(format!("/proc/{}/mem", asked.pid));
        let read = memory.and_then(|memory| memory.read_exact_at(&mut found, asked.data.args[1]));
        // SAFETY: as above.
        let mut answer: libc::seccomp_notif_resp = unsafe { std::mem::zeroed() };
        answer.id = asked.id;
        if read.is_ok() && u32::from_ne_bytes(found) == kind {
            answer.error = -libc::EINVAL;
        } else {
            answer.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).expect("one");
        }
        let request = libc::SECCOMP_IOCTL_NOTIF_SEND;
        // SAFETY: as above; it fails where the asker has ended meanwhile.
        unsafe { libc::ioctl(listener.as_raw_fd(), request, &raw mut answer) };
    }
}
