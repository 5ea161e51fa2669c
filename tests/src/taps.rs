//! Packet captures of all that leaves the pods of a pair, and their nodes.

use std::ops::Range;

use crate::{Node, Pair, Pod, Wire};

/// Captures of both pods' veths, and of the wire between the nodes.
#[derive(Debug)]
#[must_use = "nobody judges what they see"]
pub struct Taps([(&'static str, Wire); 3]);

impl Taps {
    /// Starts the captures.
    pub fn of(pair: &Pair) -> Self {
        Self::between(&pair.nodes, (&pair.client, &pair.server))
    }

    /// On what is between a pod of the first node and one of the second, from now on.
    pub fn between(nodes: &(Node, Node), (client, server): (&Pod, &Pod)) -> Self {
        let (one, two) = (&nodes.0.netns, &nodes.1.netns);
        Self([
            ("the client's veth", Wire::tap(one.file(), &client.veth)),
            ("the server's veth", Wire::tap(two.file(), &server.veth)),
            ("the wire", Wire::tap(one.file(), "wire")),
        ])
    }

    /// Ends the captures.
    ///
    /// # Panics
    /// A segment from or to one of these ports was seen; or a capture saw nothing at all.
    pub fn saw_nothing_of(self, ports: Range<u16>) {
        for (name, tap) in self.0 {
            let segments = tap.end();
            assert!(!segments.is_empty(), "the tap on {name} sees the tunnel");
            let leaked: Vec<_> = segments
                .iter()
                .filter(|segment| ports.contains(&segment.from.1) || ports.contains(&segment.to.1))
                .map(|segment| {
                    (
                        segment.from,
                        segment.to,
                        segment.flags,
                        segment.payload.len(),
                    )
                })
                .collect();
            assert!(
                leaked.is_empty(),
                "{} on {name}: {:?}",
                leaked.len(),
                &leaked[..leaked.len().min(8)]
            );
        }
    }
}
