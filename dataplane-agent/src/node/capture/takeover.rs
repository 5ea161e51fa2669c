//! Takes over the maps that another version of the agent, newer or older, has pinned and that are not as this
//! agent's programs expect them.
//!
//! The kernel is asked about each map; nothing is concluded from a version. A map that is as expected stays
//! in use. For any other map a new one is made and pinned beside it (`-new`), and gets the old one's
//! contents, before the first program of this agent is attached. Then the programs are replaced, and last the
//! new maps get the old ones' names. Until then nobody changes the contents of either. So an agent that is
//! killed on the way leaves attached programs whose maps say the same, and whole maps under the names: the
//! next agent, of whichever version, removes what is `-new` and begins again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapInfo, MapType};

use super::definition::{Definition, expected};
use super::link::Link;
use super::maps::{self, MapContents, NodeMaps};
use super::pins::{self, Pins};
use super::programs::{self, Loader};
use super::{CaptureError, attached};
use crate::sys::elements::Elements;

/// The replacement of pinned maps. Dropping it removes the new maps, unless it is finished.
pub struct Takeover {
    replaced: Vec<ReplacedMap>,
    maps: PathBuf,
}

/// A pinned map that a new one replaces.
struct ReplacedMap {
    name: &'static str,
    old: MapData,
    copied: bool,
}

/// Refuses where [`Takeover::begin`] would refuse.
///
/// # Errors
/// A map cannot be taken over.
pub fn refuse(pins: &Pins) -> Result<(), CaptureError> {
    maps_to_replace(pins).map(|_| ())
}

impl Takeover {
    /// Finds the maps to replace. The caller holds the lock of the pins.
    ///
    /// # Errors
    /// A map cannot be taken over; nothing is changed then.
    pub fn begin(pins: &Pins) -> Result<Self, CaptureError> {
        let names = maps::SHARED.into_iter().chain(maps::NODE_MAPS);
        for name in names.chain(maps::POD_MAPS) {
            pins::remove(&new_pin(&pins.maps(), name))?;
        }
        restore_pins(pins)?;
        let replaced = maps_to_replace(pins)?;
        for ReplacedMap { name, old, copied } in &replaced {
            let pinned = Definition::of_map(old).map_err(maps::map_error(name))?;
            tracing::info!(
                map = name, %pinned, copied,
                "pinned map is not as this agent's programs expect it, and another one comes in its place"
            );
        }
        Ok(Self {
            replaced,
            maps: pins.maps(),
        })
    }

    /// Returns where this agent's programs have a map pinned; the loader makes it if it is missing.
    pub fn path(&self, name: &str) -> PathBuf {
        match self.replaced.iter().any(|map| map.name == name) {
            true => new_pin(&self.maps, name),
            false => self.maps.join(name),
        }
    }

    /// Returns where a pod's listeners are pinned while its program is loaded.
    pub fn listeners(&self) -> PathBuf {
        new_pin(&self.maps, maps::LISTENERS)
    }

    /// Copies the contents of the old maps to the new ones, which the loader has made by now.
    ///
    /// # Errors
    /// A new map has too little room; the kernel refuses.
    pub fn copy(&self) -> Result<(), CaptureError> {
        for ReplacedMap { name, old, copied } in &self.replaced {
            if !copied {
                continue;
            }
            let new = MapData::from_pin(self.path(name)).map_err(maps::map_error(name))?;
            copy(old, &new).map_err(|error| {
                let why = match error.raw_os_error() {
                    Some(libc::E2BIG) => "it holds more than this agent has room for".into(),
                    _ => error.to_string(),
                };
                refused(name, &self.maps, why)
            })?;
        }
        Ok(())
    }

    /// Replaces the program of each pod that does not share all its maps with the node's new programs: since
    /// some are not as expected, or since an agent was killed while it replaced them. The links are enough
    /// for that; the pods' namespaces need not be found.
    ///
    /// # Errors
    /// The kernel refuses the program.
    pub fn replace_pod_programs(
        &self,
        loader: &mut Loader,
        pins: &Pins,
        node: &NodeMaps,
    ) -> Result<(), CaptureError> {
        let stale = StalePrograms::new(self, pins)?;
        for entry in fs::read_dir(pins.pods()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let cookie = name.to_str().and_then(|name| name.parse().ok());
            let (Some(cookie), Some(link)) = (cookie, Link::at(&entry.path())) else {
                continue;
            };
            if let Some(listeners) = stale.listeners.get(&link.program()) {
                stale.pin_listeners(listeners.as_ref())?;
                let mut program = loader.pod(cookie, node.first_address(cookie), None)?;
                program.replace(&link)?;
            }
        }
        Ok(())
    }

    /// Gives the new maps the names of the old ones, which no program uses any more, and removes pinned maps
    /// that no program of this agent uses.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn finish(self, pins: &mut Pins) -> Result<(), CaptureError> {
        for ReplacedMap { name, .. } in &self.replaced {
            let (from, to) = (new_pin(&self.maps, name), self.maps.join(name));
            fs::rename(&from, to).map_err(CaptureError::file(&from))?;
        }
        let known = |pin: &Path| {
            let mut names = maps::SHARED.iter().chain(&maps::NODE_MAPS);
            names.any(|name| pin.ends_with(name))
        };
        for pin in pins.pinned_maps().iter().filter(|pin| !known(pin)) {
            tracing::info!(pin = %pin.display(), "pinned map is none of this agent's programs', and is removed");
            pins::remove(pin)?;
        }
        pins.rename_to_own_layout()
    }
}

impl Drop for Takeover {
    fn drop(&mut self) {
        for ReplacedMap { name, .. } in &self.replaced {
            let _ = pins::remove(&new_pin(&self.maps, name));
        }
    }
}

/// The pods' programs that are to be replaced.
struct StalePrograms {
    /// The listeners of each program by its id, if the next program can take them: then their owner goes on
    /// accepting.
    listeners: BTreeMap<u32, Option<MapData>>,
    pin: PathBuf,
}

impl StalePrograms {
    fn new(takeover: &Takeover, pins: &Pins) -> Result<Self, CaptureError> {
        let expected = expected("pod", programs::POD)?;
        let as_expected =
            |map: &MapData| Definition::of_map(map).ok().as_ref() == expected.get(maps::LISTENERS);
        let pinned = |name| MapInfo::from_pin(takeover.path(name)).map_err(maps::map_error(name));
        let own = maps::SHARED.map(|name| pinned(name).map(|map| map.id()));
        let own: Vec<u32> = own.into_iter().collect::<Result<_, _>>()?;
        let mut stale = BTreeMap::new();
        for (program, ids) in attached::pinned_programs(pins)? {
            let steers = program.name_as_str() == Some(programs::POD_PROGRAM);
            if !steers || own.iter().all(|id| ids.contains(id)) {
                continue;
            }
            let listeners = map_named(&ids, maps::LISTENERS)?;
            stale.insert(program.id(), listeners.filter(as_expected));
        }
        Ok(Self {
            listeners: stale,
            pin: takeover.listeners(),
        })
    }

    /// Makes the pod's program that is loaded next take these listeners, or new ones if there are none.
    fn pin_listeners(&self, listeners: Option<&MapData>) -> Result<(), CaptureError> {
        pins::remove(&self.pin)?;
        listeners.map_or(Ok(()), |map| pin(map, &self.pin))
    }
}

impl Drop for StalePrograms {
    fn drop(&mut self) {
        let _ = pins::remove(&self.pin);
    }
}

/// Returns where a map is pinned until it replaces another one.
fn new_pin(maps: &Path, name: &str) -> PathBuf {
    pins::new_pin(&maps.join(name))
}

/// Returns the pinned maps that are not as this agent's programs expect them.
fn maps_to_replace(pins: &Pins) -> Result<Vec<ReplacedMap>, CaptureError> {
    let expected = expected("node", programs::NODE)?;
    let mut all = Vec::new();
    for name in maps::SHARED.into_iter().chain(maps::NODE_MAPS) {
        let pin = pins.maps().join(name);
        let (Some(expected), true) = (expected.get(name), pin.exists()) else {
            continue;
        };
        let old = MapData::from_pin(&pin).map_err(maps::map_error(name))?;
        let is = Definition::of_map(&old).map_err(maps::map_error(name))?;
        if is == *expected {
            continue;
        }
        let copied = match (maps::contents(name), is.copy_obstacle(expected)) {
            (MapContents::Sockets, _) => {
                let why = format!("what it holds cannot be read, and it is {is}, not {expected}");
                return Err(refused(name, &pins.maps(), why));
            }
            (MapContents::Pods, Some(why)) => return Err(refused(name, &pins.maps(), why)),
            (MapContents::Pods | MapContents::Transient, None) => true,
            (MapContents::Transient, Some(_)) | (MapContents::Rewritten, _) => false,
        };
        all.push(ReplacedMap { name, old, copied });
    }
    Ok(all)
}

/// Pins maps of attached programs again that are no longer pinned: an empty map in place of such a one would
/// release the pods that it keeps captured.
fn restore_pins(pins: &Pins) -> Result<(), CaptureError> {
    let names = maps::SHARED.into_iter().chain(maps::NODE_MAPS);
    let lost: Vec<_> = names
        .filter(|name| !pins.maps().join(name).exists())
        .collect();
    if lost.is_empty() {
        return Ok(());
    }
    for (_, ids) in attached::pinned_programs(pins)? {
        for name in &lost {
            let path = pins.maps().join(name);
            if !path.exists()
                && let Some(map) = map_named(&ids, name)?
            {
                tracing::warn!(
                    map = name,
                    "map was not pinned any more, and is pinned again"
                );
                pin(&map, &path)?;
            }
        }
    }
    Ok(())
}

/// Returns the map of this name among the maps of a program.
fn map_named(ids: &[u32], name: &'static str) -> Result<Option<MapData>, CaptureError> {
    for id in ids {
        let info = MapInfo::from_id(*id).map_err(maps::map_error(name))?;
        if info.name_as_str() == Some(name) {
            let map = MapData::from_id(*id).map_err(maps::map_error(name))?;
            return Ok(Some(map));
        }
    }
    Ok(None)
}

fn pin(map: &MapData, path: &Path) -> Result<(), CaptureError> {
    let pinned = map.pin(path).map_err(io::Error::other);
    pinned.map_err(CaptureError::file(path))
}

fn copy(old: &MapData, new: &MapData) -> io::Result<()> {
    use MapType::{Array, PerCpuArray};
    let kind = Definition::of_map(new).map_or(MapType::Unspecified, |new| new.kind);
    let of_array = matches!(kind, Array | PerCpuArray);
    let (old, new) = (Elements::of(old)?, Elements::of(new)?);
    for key in old.keys()? {
        let Some(values) = old.get(&key)? else {
            continue; // it is gone by now
        };
        match new.put(&key, &values) {
            // A slot that this agent does not have.
            Err(error) if of_array && error.raw_os_error() == Some(libc::E2BIG) => {}
            done => done?,
        }
    }
    Ok(())
}

fn refused(map: &'static str, pins: &Path, why: String) -> CaptureError {
    CaptureError::OtherLayout {
        map,
        pins: pins.to_owned(),
        why,
    }
}
