//! Looks at the machine when a look is due, and returns the last result otherwise.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::events::MachineEvents;
use super::scan_schedule::ScanSchedule;
use super::{PodLocator, Scan};
use crate::control::manifests::LocalPodSpec;
use crate::node::capture::Status;

/// The looks at this machine.
#[derive(Debug)]
pub struct Scanner {
    machine: PodLocator,
    events: MachineEvents,
    due: ScanSchedule,
    /// Subjects of the events since the last look, for the log.
    told: BTreeSet<&'static str>,
    /// The pods and the state of capture at the last look, and its result.
    last: Option<(Vec<LocalPodSpec>, Status, Arc<Scan>)>,
}

impl Scanner {
    /// Creates a scanner of the pods below the cgroup `pods`.
    ///
    /// # Errors
    /// See [`PodLocator::new`].
    pub fn new(pods: &Path) -> io::Result<Self> {
        let machine = PodLocator::new(pods)?;
        Ok(Self {
            events: MachineEvents::new(&machine.pods),
            due: ScanSchedule::new(Instant::now()),
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

    /// Returns what is known of this node's pods. Looks if a look is due, or if `pods` or `captured` differ from
    /// those of the last look.
    pub fn scan(&mut self, pods: &[LocalPodSpec], captured: &Status) -> Arc<Scan> {
        let is_due = self.due.next() <= Instant::now();
        if let Some((were, was, scan)) = &self.last
            && !is_due
            && were == pods
            && was == captured
        {
            return Arc::clone(scan);
        }
        // Watches come before the look: what happens during it is an event, and not missed.
        let is_watching = self.events.ensure_watching(Instant::now());
        let scan = Arc::new(self.machine.scan(pods, captured));
        let now = Instant::now();
        self.due
            .scanned(now, self.machine.max_interval(&scan, is_watching, now));
        let (told, next) = (std::mem::take(&mut self.told), self.due.next() - now);
        tracing::debug!(is_due, ?told, ?next, "the machine was looked at");
        self.last = Some((pods.to_vec(), captured.clone(), Arc::clone(&scan)));
        scan
    }
}
