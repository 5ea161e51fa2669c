//! Looks at the machine when it is worth it, and says otherwise what the last look brought.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::due::Due;
use super::events::Events;
use super::{Look, Machine};
use crate::control::manifests::LocalPodSpec;
use crate::node::capture::Status;

/// The looks at this machine.
#[derive(Debug)]
pub struct Looks {
    machine: Machine,
    events: Events,
    due: Due,
    /// What something has happened to since the last look.
    told: BTreeSet<&'static str>,
    /// What was looked for last, and what was found.
    last: Option<(Vec<LocalPodSpec>, Status, Arc<Look>)>,
}

impl Looks {
    /// Of pods below a cgroup.
    ///
    /// # Errors
    /// As of [`Machine::new`].
    pub fn new(pods: &Path) -> io::Result<Self> {
        let machine = Machine::new(pods)?;
        Ok(Self {
            events: Events::new(&machine.pods),
            due: Due::new(Instant::now()),
            told: BTreeSet::new(),
            last: None,
            machine,
        })
    }

    /// Waits until it is time to look. Cancelling it loses nothing.
    pub async fn due(&mut self) {
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(self.due.next().into()) => return,
                of = self.events.happened() => {
                    self.told.insert(of);
                    self.due.happened(Instant::now());
                }
            }
        }
    }

    /// What there is of the pods of this node: looks if it is time to, or if others are asked for, or capture
    /// has another state, than in the last look.
    pub fn look(&mut self, pods: &[LocalPodSpec], captured: &Status) -> Arc<Look> {
        let is_due = self.due.next() <= Instant::now();
        if let Some((were, was, look)) = &self.last
            && !is_due
            && were == pods
            && was == captured
        {
            return Arc::clone(look);
        }
        // What happens from here on is told: nothing falls between a look and its events.
        let is_told = self.events.follow(Instant::now());
        let look = Arc::new(self.machine.look(pods, captured));
        let now = Instant::now();
        self.due
            .looked(now, self.machine.longest(&look, is_told, now));
        let (told, next) = (std::mem::take(&mut self.told), self.due.next() - now);
        tracing::debug!(is_due, ?told, ?next, "the machine was looked at");
        self.last = Some((pods.to_vec(), captured.clone(), Arc::clone(&look)));
        look
    }
}
