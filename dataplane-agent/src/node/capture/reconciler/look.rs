//! Looks regularly at all that keeps pods captured, and restores what is gone.
//!
//! Every pod is looked at every few seconds, staggered against the others, and soon after a change in its
//! namespace. Looks also take over interfaces and addresses that have come or gone.

use std::collections::BTreeMap;
use std::path::Path;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::super::programs::{self, Restored};
use super::super::repair::{LostParts, Part};
use super::super::routing::Routing;
use super::super::undo::UndoRecord;
use super::super::{CaptureError, enrol, routes};
use super::{CaptureHandle, Pod, PodPhase, Reconciler, ServedPod};
use crate::mesh::workload::named;
use crate::seam::PodEvent;
use crate::sys::netns::Netns;

/// Time between two looks at one pod, and at the node's programs.
const LOOK: Duration = Duration::from_secs(3);
/// Minimum time between two looks at a pod that changes all the time.
const SETTLE: Duration = Duration::from_millis(250);

/// When a pod or the node is looked at next, and the result of the last look.
pub(super) struct LookSchedule {
    next: Instant,
    last: Instant,
    /// Why capture does not work, as of the last look; `None` if it does.
    pub(super) broken: Option<String>,
}

impl LookSchedule {
    /// Makes the first look due at once, for a pod whose state is unknown.
    pub(super) fn due_now() -> Self {
        let now = Instant::now();
        Self {
            next: now,
            last: now,
            broken: None,
        }
    }

    /// Starts the schedule of what was just put in place; `spread` staggers it against others.
    pub(super) fn staggered(spread: u64) -> Self {
        let now = Instant::now();
        let apart = Duration::from_millis(spread.wrapping_mul(367) % 1000);
        Self {
            next: now + LOOK - apart,
            last: now,
            broken: None,
        }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    pub(super) fn done(&mut self, broken: Option<String>) {
        self.done_at(Instant::now());
        self.broken = broken;
    }

    fn done_at(&mut self, now: Instant) {
        self.last = now;
        self.next = now + LOOK;
    }

    /// Brings the next look forward after a change, to [`SETTLE`] after the last one at the earliest.
    fn expedite(&mut self) {
        self.next = self.next.min(self.last + SETTLE);
    }

    fn is_expedited(&self) -> bool {
        self.next <= self.last + SETTLE
    }

    /// Returns `true` if a look is due, or nearly: looks of about the same time are made together, since each
    /// round of the reconciler costs something for every pod, whichever is looked at. An expedited look is
    /// never early.
    fn is_due(&self, now: Instant) -> bool {
        self.next <= now || !self.is_expedited() && self.next <= now + SETTLE
    }
}

impl Reconciler {
    /// Looks at all that is due.
    pub(super) async fn look(&mut self) -> Result<(), CaptureError> {
        let now = Instant::now();
        if self.schedule.is_due(now) {
            self.look_at_node();
        }
        let is_due = |pod: &Pod| pod.schedule().is_some_and(|schedule| schedule.is_due(now));
        let due = self.pods.iter().filter(|(_, pod)| is_due(pod));
        for cookie in due.map(|(cookie, _)| *cookie).collect::<Vec<u64>>() {
            self.look_at(cookie).await?;
            self.look_at_held(cookie).await;
        }
        Ok(())
    }

    /// Looks at the node's programs, and at the pins. A pod's program is loaded only after this, since it
    /// takes the maps that are pinned.
    pub(super) fn look_at_node(&mut self) {
        let mut lost_parts = LostParts::default();
        let mended = self.restore_node(&mut lost_parts);
        let broken = report(
            "the node",
            &lost_parts,
            mended,
            self.schedule.broken.as_deref(),
        );
        self.handle.repairs.count(&lost_parts);
        self.schedule.done(broken);
    }

    fn restore_node(&mut self, lost_parts: &mut LostParts) -> Result<(), CaptureError> {
        // Where nothing can be pinned, attached programs still hold.
        let folders = self.pins.restore(&mut self.pins_lock);
        let maps = self.pinned.restore(&self.pins);
        let (cgroup, links) = (&self.config.cgroup, &mut self.links);
        let (lost, programs) = match programs::restore(&mut self.node, cgroup, &self.pins, links) {
            Ok(Restored { lost, whole }) => (lost, whole),
            Err(error) => (false, Err(error)),
        };
        for (part, lost) in [(Part::Pin, matches!(maps, Ok(true))), (Part::Program, lost)] {
            if lost {
                lost_parts.add(part);
            }
        }
        folders.and(maps).and(programs)
    }

    async fn look_at(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return Ok(());
        };
        let serving = matches!(pod.phase, PodPhase::Serving(_));
        let (name, record) = (named(&pod.uid).to_owned(), &pod.record);
        let Some(served) = pod.phase.served_mut() else {
            return Ok(());
        };
        let mut lost_parts = LostParts::default();
        // A part that cannot be restored does not keep the others from it. Addresses come first: somebody
        // else may have one by now.
        let mut mended = update_addresses(served, &self.handle, &self.events).await;
        mended = mended.and(contain(served, record, &self.pins.pod(cookie), &mut lost_parts).await);
        // If it cannot be read, the last value stays.
        let forwards = routes::forwards(&served.desired.netns, &served.interfaces);
        served.forwards = forwards.unwrap_or(served.forwards);
        if serving {
            mended = mended.and(restore_entries(served, &self.handle, &mut lost_parts));
        }
        let broken = report(
            &name,
            &lost_parts,
            mended,
            served.schedule.broken.as_deref(),
        );
        self.handle.repairs.count(&lost_parts);
        served.schedule.done(broken);
        if lost_parts.has(Part::Listener) {
            // The pod is enrolled anew with other listeners; its connections are cut.
            self.cut_connections(cookie).await?;
        }
        Ok(())
    }
}

/// Updates the pod's own addresses to those on its interfaces now.
async fn update_addresses(
    served: &mut ServedPod,
    handle: &CaptureHandle,
    events: &mpsc::Sender<PodEvent>,
) -> Result<(), CaptureError> {
    let desired = &served.desired;
    let interfaces = enrol::interfaces(&desired.netns)?;
    if interfaces != served.interfaces {
        served.interfaces = interfaces;
        served.addresses_sent = false;
    }
    if !served.addresses_sent {
        let (addresses, _) =
            enrol::update_addresses(desired.address_owner(), &served.interfaces, handle)?;
        if addresses != served.addresses {
            tracing::info!(
                pod = %named(&desired.uid),
                ?addresses,
                "pod has other addresses than it had"
            );
        }
        served.send_addresses(addresses, events).await?;
        served.addresses_sent = true;
    }
    enrol::check_known(&served.desired, &served.interfaces)
}

/// Restores what keeps the pod's packets inside, whether it is captured or leaving: program, routes, settings.
async fn contain(
    served: &mut ServedPod,
    record: &UndoRecord,
    pin: &Path,
    lost_parts: &mut LostParts,
) -> Result<(), CaptureError> {
    let routed = match restore_program(served, pin, lost_parts) {
        Ok(pinned) => restore_routes(served, lost_parts).await.and(pinned),
        // Without the program, packets that take the routes would reach the pod's own app.
        Err(error) => Err(error),
    };
    routed.and(restore_settings(&served.desired.netns, record, lost_parts))
}

/// Attaches the pod's program if it is not attached. The inner result says whether it is pinned too.
pub(super) fn restore_program(
    served: &mut ServedPod,
    pin: &Path,
    lost_parts: &mut LostParts,
) -> Result<Result<(), CaptureError>, CaptureError> {
    let Restored { lost, whole } = served.program.restore(&served.desired.netns, pin)?;
    if lost {
        lost_parts.add(Part::Steer);
    }
    Ok(whole)
}

/// Restores the pod's rules and routes.
async fn restore_routes(
    served: &mut ServedPod,
    lost_parts: &mut LostParts,
) -> Result<(), CaptureError> {
    let desired = &served.desired;
    let addresses = enrol::addresses(&desired.addresses, &served.interfaces);
    let routing = Routing::of(&addresses, &served.interfaces);
    let lacked = routes::put(&desired.netns, &routing).await?;
    lost_parts.add_routing(&lacked, &served.routing);
    served.routing = routing;
    Ok(())
}

/// Restores the settings of the pod's namespace that capture needs.
pub(super) fn restore_settings(
    netns: &Netns,
    record: &UndoRecord,
    lost_parts: &mut LostParts,
) -> Result<(), CaptureError> {
    let is = routes::read_sysctls(netns)?;
    let lost = record.sysctls.keys().filter(|name| {
        let value = is.get(*name);
        value.is_some_and(|value| value != "1")
    });
    let lost: Vec<&String> = lost.collect();
    if !lost.is_empty() {
        routes::set_sysctls(netns, lost.into_iter().map(|name| (name, "1")))?;
        lost_parts.add(Part::Setting);
    }
    Ok(())
}

/// Restores the map entries by which new connections are captured, and checks that the listeners are alive.
fn restore_entries(
    served: &ServedPod,
    handle: &CaptureHandle,
    lost_parts: &mut LostParts,
) -> Result<(), CaptureError> {
    if !served.listeners.alive() {
        lost_parts.add(Part::Listener);
    }
    let desired = &served.desired;
    let first = served.addresses.first().copied();
    let mut maps = handle.maps();
    if maps.restore(desired.cookie, first, &desired.groups)? {
        lost_parts.add(Part::Entry);
    }
    Ok(())
}

/// Logs the result of a look, each error once, and returns why capture does not work, if it does not.
pub(super) fn report(
    whose: &str,
    lost_parts: &LostParts,
    mended: Result<(), CaptureError>,
    before: Option<&str>,
) -> Option<String> {
    let broken = mended.err().map(|error| error.to_string());
    match &broken {
        Some(why) if before != Some(why) => {
            tracing::error!(pod = whose, gone = %lost_parts, error = %why, "what keeps a pod captured cannot be put back; it is tried again");
        }
        Some(_) => {}
        None if !lost_parts.is_empty() => {
            tracing::warn!(pod = whose, gone = %lost_parts, "what keeps a pod captured was gone, and is put back");
        }
        None if before.is_some() => tracing::info!(pod = whose, "it is captured as it is to be"),
        None => {}
    }
    broken
}

/// Is ready when the namespace of a served pod changes.
pub(super) fn changed(pods: &mut BTreeMap<u64, Pod>, context: &mut Context<'_>) -> Poll<()> {
    let mut told = Poll::Pending;
    for pod in pods.values_mut() {
        if let Some(served) = pod.phase.served_mut()
            && !served.schedule.is_expedited()
            && served.changes.poll(context).is_ready()
        {
            served.schedule.expedite();
            told = Poll::Ready(());
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pods_are_looked_at_in_few_rounds_and_none_later_than_it_is_due() {
        const PODS: u64 = 250;
        const LOOKS: u32 = 10;
        let mut pods: Vec<LookSchedule> = (0..PODS).map(LookSchedule::staggered).collect();
        let begin = Instant::now();
        let (mut rounds, mut now) = (0, begin);
        while now < begin + LOOK * LOOKS {
            now = pods.iter().map(LookSchedule::next).min().expect("a pod");
            rounds += 1;
            for pod in pods.iter_mut().filter(|pod| pod.is_due(now)) {
                assert!(pod.next >= now, "it is late");
                pod.done_at(now);
            }
        }
        let most = LOOK.as_millis() / SETTLE.as_millis() + 1;
        assert!(rounds <= u128::from(LOOKS + 1) * most, "{rounds} rounds");
    }

    #[test]
    fn a_pod_that_changes_all_the_time_waits_its_time_whoever_else_is_due() {
        let mut pod = LookSchedule::staggered(0);
        let now = pod.next();
        pod.done_at(now);
        pod.expedite();
        assert!(!pod.is_due(now + SETTLE / 2));
        assert!(pod.is_due(now + SETTLE));
    }
}
