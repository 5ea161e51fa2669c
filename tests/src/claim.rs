//! A number that is unique among all test processes that run at the same time. The kernel releases it when
//! the process ends, however it does.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::OnceLock;

/// The largest number; the smallest is 1.
pub const NUMBERS: u32 = 95;

/// A number that is claimed as long as this lives, by the name of a socket that no other process can take.
#[derive(Debug)]
pub struct Claim {
    /// The number.
    pub number: u32,
    _socket: UnixListener,
}

impl Claim {
    /// Claims the first free number, starting at one that depends on `from`.
    ///
    /// # Panics
    /// All are taken.
    pub fn new(from: u32) -> Self {
        let claim = |number| {
            let name = format!("dataplane-tests-{number}");
            let address = SocketAddr::from_abstract_name(name).expect("it is short");
            let socket = UnixListener::bind_addr(&address).ok()?;
            Some(Self {
                number,
                _socket: socket,
            })
        };
        let mut numbers = (0..NUMBERS).map(|more| (from + more) % NUMBERS + 1);
        let claimed = numbers.find_map(claim);
        claimed.unwrap_or_else(|| panic!("{NUMBERS} test processes run"))
    }
}

/// Returns this process' number. The search starts at its process ID, so that numbers of recent processes, whose
/// leftovers may take a moment to go, are tried last.
pub fn own() -> u32 {
    static OWN: OnceLock<Claim> = OnceLock::new();
    OWN.get_or_init(|| Claim::new(std::process::id())).number
}
