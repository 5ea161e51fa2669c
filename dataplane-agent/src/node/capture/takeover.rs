//! Takes over what another version of the agent has pinned, newer or older: maps that are not as this
//! agent's programs expect them.
//!
//! What is there is asked of the kernel, map by map, and never concluded from a version. A map that is as
//! expected goes on as it is. In the place of another one comes a new one, pinned beside it (`-new`), with
//! what the old one holds, before the first program of this agent is attached. Then the programs take the
//! places of the old ones, and last the new maps take the old ones' names. Until then nobody changes what
//! is in either. So whoever is killed on the way leaves programs attached whose maps say the same, and
//! whole maps under the names: the next agent, of whichever version, removes what is `-new` and begins
//! again.

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

/// What is to be done with the pinned maps. Those that were made for it go with it, unless it is finished.
pub struct Takeover {
    replaced: Vec<ReplacedMap>,
    maps: PathBuf,
}

/// A map in whose place another one comes.
struct ReplacedMap {
    name: &'static str,
    old: MapData,
    copied: bool,
}

/// Refuses where [`Takeover::begin`] would.
///
/// # Errors
/// A map cannot be taken over, and why.
pub fn refuse(pins: &Pins) -> Result<(), CaptureError> {
    maps_to_replace(pins).map(|_| ())
}

impl Takeover {
    /// Finds out what there is to do. The pins are this process's alone.
    ///
    /// # Errors
    /// A map cannot be taken over, and why; nothing is changed then.
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

    /// Where a map is that this agent's programs have: it is made there if it is not there.
    pub fn path(&self, name: &str) -> PathBuf {
        match self.replaced.iter().any(|map| map.name == name) {
            true => new_pin(&self.maps, name),
            false => self.maps.join(name),
        }
    }

    /// Where a pod's listeners are pinned as its program is loaded.
    pub fn listeners(&self) -> PathBuf {
        new_pin(&self.maps, maps::LISTENERS)
    }

    /// Copies to the new maps, which are made by now, what the old ones hold.
    ///
    /// # Errors
    /// There is no room in one; the kernel refuses.
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

    /// Puts this agent's program in the place of each pod's that has other maps than the node's programs
    /// will have, such as where its former maps are not as expected, or where one that was killed has begun
    /// to put others in their place. The pods' namespaces are not asked for, since they need not be found.
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

    /// Gives the new maps the names of the old ones, which nobody has any more, and removes those that no
    /// program of this agent has.
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
    /// By their numbers, each with its listeners, if the next program can have them: whoever holds those is
    /// served on.
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

    /// Has the pod's program that is loaded next take these listeners, or else new ones.
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

/// Where a map is pinned until it takes another one's place.
fn new_pin(maps: &Path, name: &str) -> PathBuf {
    pins::new_pin(&maps.join(name))
}

/// The pinned maps that are not as this agent's programs expect them.
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

/// Pins again, by its name, what attached programs have and is not pinned any more: an empty map in its
/// place would let go of whom that one keeps captured.
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

/// The map of this name among those of a program.
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
            // A slot that this agent does not know.
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
