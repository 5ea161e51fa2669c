//! Held pods: they are to be captured while nobody serves them, since a predecessor left them and they are
//! not found (again), or since they cannot be enrolled. Their capture is kept in repair like that of served
//! pods.

use std::path::Path;

use super::super::enrol::AddressOwner;
use super::super::link::Link;
use super::super::pins::Pins;
use super::super::programs::{self, Loader, PodProgram, Restored};
use super::super::repair::{LostParts, Part};
use super::super::routing::Routing;
use super::super::undo::UndoRecord;
use super::super::{CaptureError, enrol, routes};
use super::look::{LookSchedule, report, restore_settings};
use super::{CaptureHandle, Reconciler};
use crate::mesh::workload::named;
use crate::sys::interfaces::Interfaces;
use crate::sys::netns::Netns;

/// The capture of an unserved pod, as of the last look.
pub(super) struct HeldPod {
    pub(super) schedule: LookSchedule,
    /// The link that attaches the pod's program.
    steer: Option<Link>,
    interfaces: Option<Interfaces>,
    routing: Routing,
}

impl Default for HeldPod {
    fn default() -> Self {
        Self {
            schedule: LookSchedule::due_now(),
            steer: None,
            interfaces: None,
            routing: Routing::default(),
        }
    }
}

impl Reconciler {
    /// Looks at a pod, if it is held, and restores what it has lost.
    pub(super) async fn look_at_held(&mut self, cookie: u64) {
        if self.pods.get(&cookie).is_none_or(|pod| pod.held.is_none()) {
            return;
        }
        self.look_at_node();
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return;
        };
        let Some(held) = &mut pod.held else {
            return;
        };
        let mut lost_parts = LostParts::default();
        let mended = match find_netns(&mut pod.netns, &pod.record) {
            Ok(Some(netns)) => {
                let parts = (&mut self.loader, &self.pins, &self.handle);
                held.restore(netns, &pod.record, parts, &mut lost_parts)
                    .await
            }
            // Nobody has the namespace; control decides when it is gone.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        let broken = report(
            named(&pod.uid),
            &lost_parts,
            mended,
            held.schedule.broken.as_deref(),
        );
        self.handle.repairs.count(&lost_parts);
        held.schedule.done(broken);
    }
}

/// Returns the pod's namespace; looks for it again if it was not found at the start.
fn find_netns<'a>(
    netns: &'a mut Option<Netns>,
    record: &UndoRecord,
) -> Result<Option<&'a Netns>, CaptureError> {
    if netns.is_none() {
        *netns = record.netns()?;
    }
    Ok(netns.as_ref())
}

impl HeldPod {
    /// Keeps the program of a pod that was served.
    pub(super) fn with_program(program: PodProgram) -> Self {
        Self {
            steer: program.into_link(),
            ..Self::default()
        }
    }

    /// Pins the program again if its pin was lost. A program that is no longer attached is not pinned: its
    /// pin would replace that of one that is.
    ///
    /// # Errors
    /// The file system refuses; the kernel does not say which programs are attached.
    pub(super) fn pin(&self, netns: &Netns, pin: &Path) -> Result<(), CaptureError> {
        match &self.steer {
            Some(link) if programs::is_attached(netns, self.program())? && !link.is_at(pin) => {
                link.pin(pin)
            }
            _ => Ok(()),
        }
    }

    async fn restore(
        &mut self,
        netns: &Netns,
        record: &UndoRecord,
        (loader, pins, handle): (&mut Loader, &Pins, &CaptureHandle),
        lost_parts: &mut LostParts,
    ) -> Result<(), CaptureError> {
        // As for a served pod: addresses first, since somebody else may have them by now; and a part that
        // cannot be restored does not keep the others from it.
        let own = self.update_addresses(netns, record, handle, lost_parts);
        let steered = self.restore_program(netns, record.cookie, (loader, pins), lost_parts);
        let routed = match steered {
            Ok(pinned) => self.restore_routes(netns, lost_parts).await.and(pinned),
            Err(error) => Err(error),
        };
        own.and(routed)
            .and(restore_settings(netns, record, lost_parts))
    }

    /// Updates the pod's own addresses in the kernel if its interfaces have changed, and restores lost entries.
    fn update_addresses(
        &mut self,
        netns: &Netns,
        record: &UndoRecord,
        handle: &CaptureHandle,
        lost_parts: &mut LostParts,
    ) -> Result<(), CaptureError> {
        let interfaces = enrol::interfaces(netns)?;
        if self.interfaces.as_ref() != Some(&interfaces) {
            let pod = AddressOwner {
                uid: &record.uid,
                cookie: record.cookie,
                known: &[],
            };
            enrol::update_addresses(pod, &interfaces, handle)?;
            self.interfaces = Some(interfaces);
        }
        if handle.maps().restore_addresses(record.cookie)? {
            lost_parts.add(Part::Entry);
        }
        Ok(())
    }

    /// Returns the id of the program that steers, once it is known.
    pub(super) fn program(&self) -> Option<u32> {
        self.steer.as_ref().map(Link::program)
    }

    /// Attaches the pod's program: the predecessor's, or one without listeners, which lets nobody in or out.
    /// Once it is attached, the inner result says whether it is pinned too.
    fn restore_program(
        &mut self,
        netns: &Netns,
        cookie: u64,
        (loader, pins): (&mut Loader, &Pins),
        lost_parts: &mut LostParts,
    ) -> Result<Result<(), CaptureError>, CaptureError> {
        let pin = pins.pod(cookie);
        if self.steer.is_none() {
            self.steer = Link::at(&pin);
        }
        let attached = programs::is_attached(netns, self.program())?;
        let Restored { lost, whole } = match &self.steer {
            Some(link) if attached => Restored::of(link, true, &pin),
            _ => {
                let mut program = loader.pod(cookie, None, None)?;
                let restored = program.restore(netns, &pin)?;
                self.steer = program.into_link();
                restored
            }
        };
        if lost {
            lost_parts.add(Part::Steer);
        }
        Ok(whole)
    }

    /// Restores the pod's rules and routes.
    async fn restore_routes(
        &mut self,
        netns: &Netns,
        lost_parts: &mut LostParts,
    ) -> Result<(), CaptureError> {
        let Some(interfaces) = &self.interfaces else {
            return Ok(());
        };
        let routing = Routing::of(&enrol::addresses(&[], interfaces), interfaces);
        let lacked = routes::put(netns, &routing).await?;
        lost_parts.add_routing(&lacked, &self.routing);
        self.routing = routing;
        Ok(())
    }
}
