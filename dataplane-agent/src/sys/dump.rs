//! Netlink dumps of a namespace's interfaces, addresses, rules and routes, read no further than needed.
//!
//! A pod may have hundreds of thousands of them. `rtnetlink` reads all that it asked for, and ignores the
//! error with which a dump ends, so that a failed dump looks like an empty one.

use std::io;
use std::ops::ControlFlow;

use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};

use super::netns::Netns;

/// The kernel sends no more in one datagram: `netlink_dump` takes 32 KiB, or as much as its longest entry needs, and an
/// interface has at most 64 KiB of names.
const MAX_DATAGRAM: usize = 128 * 1024;

/// Asks for what matches `of`, and passes each message to `each` until that breaks. The kernel refuses
/// attributes by which it cannot select. `M`: what is read of each message.
///
/// # Errors
/// The namespace cannot be entered; the error that the kernel reports, before the first message or after any.
pub fn dump<M: NetlinkDeserializable>(
    netns: &Netns,
    of: RouteNetlinkMessage,
    each: impl FnMut(M) -> ControlFlow<()>,
) -> io::Result<()> {
    let socket = netns.enter(|| Socket::new(NETLINK_ROUTE))??;
    ask(&socket, of, each)
}

fn ask<M: NetlinkDeserializable>(
    socket: &Socket,
    of: RouteNetlinkMessage,
    mut each: impl FnMut(M) -> ControlFlow<()>,
) -> io::Result<()> {
    // Without this the kernel sends the routes of all tables, whichever is asked for.
    socket.set_netlink_get_strict_chk(true)?;
    let mut request = NetlinkMessage::from(of);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut bytes = vec![0; MAX_DATAGRAM];
    loop {
        // The next part is there as soon as the last one was read: nothing blocks here.
        let length = socket.recv(&mut &mut bytes[..], libc::MSG_DONTWAIT)?;
        let mut told = &bytes[..length];
        while !told.is_empty() {
            let message = NetlinkMessage::deserialize(told)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let next = message.header.length.next_multiple_of(4) as usize;
            told = told.get(next..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(one) => {
                    if each(one).is_break() {
                        return Ok(());
                    }
                }
                NetlinkPayload::Done(done) if done.code == 0 => return Ok(()),
                NetlinkPayload::Done(done) => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => return Err(io::Error::other("it was not asked for")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::route::{RouteAttribute, RouteMessage};

    use super::*;

    /// Returns the number of routes in a table's dump, and how the dump ends.
    fn routes(table: u32, prefix: u8) -> (usize, io::Result<()>) {
        let socket = Socket::new(NETLINK_ROUTE).expect("a socket");
        let mut of = RouteMessage::default();
        of.header.address_family = AddressFamily::Inet;
        of.header.destination_prefix_length = prefix;
        of.attributes.push(RouteAttribute::Table(table));
        let mut told = 0;
        let of = RouteNetlinkMessage::GetRoute(of);
        let end = ask(&socket, of, |_: RouteNetlinkMessage| {
            told += 1;
            ControlFlow::Continue(())
        });
        (told, end)
    }

    #[test]
    fn an_error_that_a_dump_ends_with_is_told() {
        const LOCAL: u32 = 255;
        let (told, end) = routes(LOCAL, 0);
        assert!(told > 0 && end.is_ok(), "{told}, {end:?}");
        let errno = |(told, end): (usize, io::Result<()>)| {
            assert_eq!(told, 0);
            end.expect_err("an error").raw_os_error()
        };
        assert_eq!(errno(routes(15_099, 0)), Some(libc::ENOENT), "no table");
        assert_eq!(errno(routes(LOCAL, 8)), Some(libc::EINVAL), "not strict");
    }
}
