//! The definition of a kernel map: as the kernel reports it, and as an object file asks for it.

use std::collections::BTreeMap;
use std::fmt;

use aya::maps::{MapData, MapError, MapType};
use aya_obj::Object;
use aya_obj::generated::bpf_map_type;

use super::CaptureError;
use super::maps::chain;
use crate::sys::elements::is_per_cpu;

/// The definition of a map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Definition {
    /// The map's type.
    pub kind: MapType,
    /// Size of a key in bytes.
    pub key_size: u32,
    /// Size of a value in bytes; of a per-CPU map, for one CPU.
    pub value_size: u32,
    /// Maximum number of entries; of a ring buffer, its size in bytes.
    pub max_entries: u32,
    /// The map's `BPF_F_…` flags.
    pub flags: u32,
}

/// Returns the definitions of an object's maps, by their names.
///
/// # Errors
/// This build has no such object, or it cannot be parsed.
pub fn expected(
    object: &'static str,
    bytes: &[u8],
) -> Result<BTreeMap<String, Definition>, CaptureError> {
    if bytes.is_empty() {
        return Err(CaptureError::NoObject(object));
    }
    let parsed = Object::parse(bytes).map_err(|error| CaptureError::Program {
        program: object,
        why: chain(&error),
    })?;
    let maps = parsed.maps.into_iter();
    Ok(maps
        .map(|(name, map)| (name, Definition::of_object(&map)))
        .collect())
}

impl Definition {
    /// Returns the definition of an existing map.
    ///
    /// # Errors
    /// The kernel refuses; aya does not know the map's type.
    pub fn of_map(map: &MapData) -> Result<Self, MapError> {
        let info = map.info()?;
        Ok(Self {
            kind: info.map_type()?,
            key_size: info.key_size(),
            value_size: info.value_size(),
            max_entries: info.max_entries(),
            flags: info.map_flags(),
        })
    }

    /// Returns the definition in an object. The loader rounds a ring buffer's size up to pages; ours are whole pages.
    fn of_object(map: &aya_obj::Map) -> Self {
        let kind = bpf_map_type::try_from(map.map_type()).ok();
        let kind = kind.and_then(|kind| MapType::try_from(kind).ok());
        Self {
            kind: kind.unwrap_or(MapType::Unspecified),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        }
    }

    /// Returns why the contents cannot be copied into another map; `None` if they can.
    pub fn copy_obstacle(&self, other: &Self) -> Option<String> {
        use MapType::{Array, Hash, LruHash, LruPerCpuHash, PerCpuArray, PerCpuHash};
        let listed = [Array, Hash, LruHash, LruPerCpuHash, PerCpuArray, PerCpuHash];
        let both = listed.contains(&self.kind) && listed.contains(&other.kind);
        if !both
            || is_per_cpu(self.kind) != is_per_cpu(other.kind)
            || self.key_size != other.key_size
        {
            return Some(format!("it is {self}, not {other}"));
        }
        None
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            key_size,
            value_size,
            max_entries,
            flags,
        } = self;
        write!(
            f,
            "{kind:?} of {max_entries}, keys of {key_size} bytes, values of {value_size}, flags {flags:#x}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_listed_by_the_same_keys_is_copied() {
        let hash = Definition {
            kind: MapType::Hash,
            key_size: 8,
            value_size: 4,
            max_entries: 10,
            flags: 0,
        };
        for (other, is_copied) in [
            (
                Definition {
                    value_size: 16,
                    max_entries: 5,
                    flags: 1,
                    ..hash
                },
                true,
            ),
            (
                Definition {
                    kind: MapType::LruHash,
                    ..hash
                },
                true,
            ),
            (
                Definition {
                    key_size: 4,
                    ..hash
                },
                false,
            ),
            (
                Definition {
                    kind: MapType::PerCpuHash,
                    ..hash
                },
                false,
            ),
            (
                Definition {
                    kind: MapType::SkStorage,
                    ..hash
                },
                false,
            ),
        ] {
            for (from, to) in [(hash, other), (other, hash)] {
                assert_eq!(
                    from.copy_obstacle(&to).is_none(),
                    is_copied,
                    "{from} to {to}"
                );
            }
        }
    }
}
