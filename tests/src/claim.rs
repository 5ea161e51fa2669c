//! A number that this process alone has of all test processes that run beside each other. The kernel takes
//! it back when the process ends, however it does.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::OnceLock;

/// Numbers are from 1 to this.
pub const NUMBERS: u32 = 95;

/// One that is had for as long as this lives: a socket's name, which nobody else can take.
#[derive(Debug)]
pub struct Claim {
    /// Which one.
    pub number: u32,
    _socket: UnixListener,
}

impl Claim {
    /// The first that nobody has, from this one on.
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

/// This process' own. Others than those before it had are tried first: what they left may take a moment to go.
pub fn own() -> u32 {
    static OWN: OnceLock<Claim> = OnceLock::new();
    OWN.get_or_init(|| Claim::new(std::process::id())).number
}
