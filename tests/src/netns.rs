//! Named network namespaces, which their guards remove, and their contents.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

/// Returns `true` if this kernel has IPv6.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// A named network namespace, removed on drop.
#[derive(Debug)]
pub struct Netns {
    /// Its name, below `/run/netns`.
    pub name: String,
}

impl Netns {
    /// Creates it, with `lo` up.
    pub fn new(name: &str) -> Self {
        batch(None, &format!("netns add {name}\n"));
        batch(Some(name), "link set lo up\n");
        Self {
            name: name.to_owned(),
        }
    }

    /// Returns a descriptor of it.
    pub fn file(&self) -> File {
        let path = format!("/run/netns/{}", self.name);
        File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Returns its cookie, by which agents name its pins and records.
    pub fn cookie(&self) -> String {
        let mut cookie = 0_u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        let done = self.run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            // SAFETY: the descriptor is open; the kernel writes as much as the length says.
            let done = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_NETNS_COOKIE,
                    (&raw mut cookie).cast(),
                    &raw mut length,
                )
            };
            match done {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
        done.expect("a cookie");
        cookie.to_string()
    }

    /// Runs these `ip` commands in it, one per line.
    pub fn ip(&self, commands: &str) {
        batch(Some(&self.name), commands);
    }

    /// Runs `ip` commands in it, unless this kernel has no IPv6.
    pub fn ip6(&self, commands: &str) {
        if has_ipv6() {
            self.ip(commands);
        }
    }

    /// Returns the output of an `ip` command in it.
    ///
    /// # Panics
    /// The command fails; that must not be taken for empty output.
    pub fn show(&self, command: &str) -> String {
        let output = Command::new("ip")
            .args(["-n", &self.name])
            .args(command.split(' '))
            .output()
            .expect("ip is installed");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {command}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `work` in it, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("enter a namespace");
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Returns a setting below `/proc/sys`.
    pub fn sysctl(&self, name: &str) -> String {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let text = self.run(|| std::fs::read_to_string(&path));
        text.unwrap_or_else(|error| panic!("{name}: {error}"))
            .trim()
            .to_owned()
    }

    /// Changes a setting below `/proc/sys`.
    pub fn set_sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .stderr(Stdio::null())
            .status();
    }
}

fn batch(netns: Option<&str>, commands: &str) {
    let mut ip = Command::new("ip");
    if let Some(name) = netns {
        ip.args(["-n", name]);
    }
    let mut ip = ip
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip is installed");
    let mut stdin = ip.stdin.take().expect("it was asked for");
    stdin.write_all(commands.as_bytes()).expect("ip reads");
    drop(stdin);
    let output = ip.wait_with_output().expect("ip ends");
    assert!(
        output.status.success(),
        "ip {netns:?}: {}\n{commands}",
        String::from_utf8_lossy(&output.stderr)
    );
}
