//! A pod that is to be captured and that nobody serves: a predecessor has left it, and it is not found
//! (again), or cannot be enrolled. What keeps it captured is looked after as for one that is served.

use std::path::Path;

use super::super::enrol::Own;
use super::super::link::Link;
use super::super::pins::Pins;
use super::super::programs::{self, Loader, PodProgram, Restored};
use super::super::repair::{Gone, Part};
use super::super::routing::Routing;
use super::super::undo::Record;
use super::super::{CaptureError, enrol, routes};
use super::look::{Looks, set, told};
use super::{Room, Window};
use crate::mesh::workload::named;
use crate::sys::netns::{Interfaces, Netns};

/// What keeps it captured, as it was looked at last.
pub(super) struct Held {
    pub(super) looks: Looks,
    /// What its program is attached by.
    steer: Option<Link>,
    interfaces: Option<Interfaces>,
    routing: Routing,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            looks: Looks::at_once(),
            steer: None,
            interfaces: None,
            routing: Routing::default(),
        }
    }
}

impl Room {
    /// Looks at a pod, if it is held.
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
        let mut gone = Gone::default();
        let mended = match found(&mut pod.netns, &pod.record) {
            Ok(Some(netns)) => {
                let means = (&mut self.loader, &self.pins, &self.window);
                held.mend(netns, &pod.record, means, &mut gone).await
            }
            // Nobody has it; that it is gone is for control to say.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        let broken = told(named(&pod.uid), &gone, mended, held.looks.broken.as_deref());
        self.window.repairs.count(&gone);
        held.looks.done(broken);
    }
}

/// Its namespace, which is looked for again if the look at the start was not whole.
fn found<'a>(
    netns: &'a mut Option<Netns>,
    record: &Record,
) -> Result<Option<&'a Netns>, CaptureError> {
    if netns.is_none() {
        *netns = record.netns()?;
    }
    Ok(netns.as_ref())
}

impl Held {
    /// By the program of one that was served.
    pub(super) fn by(program: PodProgram) -> Self {
        Self {
            steer: program.into_link(),
            ..Self::default()
        }
    }

    /// Pins what steers, if its pin was lost. One that was detached does not steer any more: pinned, it would
    /// take the place of one that does.
    ///
    /// # Errors
    /// The file system refuses; the kernel does not tell what steers.
    pub(super) fn pin(&self, netns: &Netns, pin: &Path) -> Result<(), CaptureError> {
        match &self.steer {
            Some(link) if programs::steers(netns, self.program())? && !link.is_at(pin) => {
                link.pin(pin)
            }
            _ => Ok(()),
        }
    }

    async fn mend(
        &mut self,
        netns: &Netns,
        record: &Record,
        (loader, pins, window): (&mut Loader, &Pins, &Window),
        gone: &mut Gone,
    ) -> Result<(), CaptureError> {
        // As for one that is served: what somebody else may have by now first, and what fails of one is
        // no reason to leave the others.
        let own = self.own(netns, record, window, gone);
        let steered = self.steered(netns, record.cookie, (loader, pins), gone);
        let routed = match steered {
            Ok(pinned) => self.routed(netns, gone).await.and(pinned),
            Err(error) => Err(error),
        };
        own.and(routed).and(set(netns, record, gone))
    }

    /// What is its own.
    fn own(
        &mut self,
        netns: &Netns,
        record: &Record,
        window: &Window,
        gone: &mut Gone,
    ) -> Result<(), CaptureError> {
        let interfaces = enrol::interfaces(netns)?;
        if self.interfaces.as_ref() != Some(&interfaces) {
            let pod = Own {
                uid: &record.uid,
                cookie: record.cookie,
                known: &[],
            };
            enrol::own(pod, &interfaces, window)?;
            self.interfaces = Some(interfaces);
        }
        if window.maps().restore_own(record.cookie)? {
            gone.add(Part::Entry);
        }
        Ok(())
    }

    /// The id of what steers, once it is known.
    pub(super) fn program(&self) -> Option<u32> {
        self.steer.as_ref().map(Link::program)
    }

    /// Its program: the predecessor's, or one without listeners, which lets nobody in or out. Whether it is
    /// pinned, if it is attached.
    fn steered(
        &mut self,
        netns: &Netns,
        cookie: u64,
        (loader, pins): (&mut Loader, &Pins),
        gone: &mut Gone,
    ) -> Result<Result<(), CaptureError>, CaptureError> {
        let pin = pins.pod(cookie);
        if self.steer.is_none() {
            self.steer = Link::at(&pin);
        }
        let attached = programs::steers(netns, self.program())?;
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
            gone.add(Part::Steer);
        }
        Ok(whole)
    }

    /// Its rules and routes.
    async fn routed(&mut self, netns: &Netns, gone: &mut Gone) -> Result<(), CaptureError> {
        let Some(interfaces) = &self.interfaces else {
            return Ok(());
        };
        let routing = Routing::of(&enrol::addresses(&[], interfaces), interfaces);
        let lacked = routes::put(netns, &routing).await?;
        gone.of_routing(&lacked, &self.routing);
        self.routing = routing;
        Ok(())
    }
}
