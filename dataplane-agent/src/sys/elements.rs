//! The elements of a kernel map, as bytes: aya needs their types, which are not known for a map that another
//! version made.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{MapData, MapInfo, MapType};
use aya::util::nr_cpus;

/// `BPF_MAP_LOOKUP_ELEM`, `BPF_MAP_UPDATE_ELEM` and `BPF_MAP_GET_NEXT_KEY` of `enum bpf_cmd`.
const GET: libc::c_long = 1;
const PUT: libc::c_long = 2;
const NEXT: libc::c_long = 4;

/// Returns `true` if each CPU has a value of its own in maps of this type.
pub fn is_per_cpu(kind: MapType) -> bool {
    use MapType::{LruPerCpuHash, PerCpuArray, PerCpuHash};
    matches!(kind, PerCpuHash | PerCpuArray | LruPerCpuHash)
}

/// The elements of a map whose keys can be listed.
#[derive(Debug)]
pub struct Elements<'a> {
    map: &'a MapData,
    key: usize,
    /// Size of one CPU's value in the kernel's buffer.
    value: usize,
    cpus: usize,
    most: usize,
}

/// The part of `union bpf_attr` for commands on elements.
#[repr(C)]
struct Attributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<'a> Elements<'a> {
    /// Returns access to the elements of `map`, with the sizes that the kernel reports.
    ///
    /// # Errors
    /// The kernel's information about the map, or the number of possible CPUs, cannot be read.
    pub fn of(map: &'a MapData) -> io::Result<Self> {
        let info: MapInfo = map.info().map_err(io::Error::other)?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        let per_cpu = info.map_type().is_ok_and(is_per_cpu);
        let (value, cpus) = match per_cpu {
            true => (
                value.next_multiple_of(8),
                nr_cpus().map_err(|(_, error)| error)?,
            ),
            false => (value, 1),
        };
        Ok(Self {
            map,
            key,
            value,
            cpus,
            most: info.max_entries() as usize,
        })
    }

    /// Returns all keys. Keys that are added meanwhile may be missed; if keys are removed meanwhile, the kernel
    /// starts again, and some are returned twice.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        while keys.len() < 2 * self.most {
            let mut next = vec![0; self.key];
            let after = keys.last().map_or(0, |key| address(key));
            match self.call(NEXT, after, next.as_mut_ptr().expose_provenance() as u64) {
                Ok(()) => keys.push(next),
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            }
        }
        Ok(keys)
    }

    /// Returns the value of a key, one for each CPU in a per-CPU map; `None` if the key is gone.
    ///
    /// # Errors
    /// The kernel refuses; the key has another size.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
        self.fits(key)?;
        let mut values = vec![0; self.value * self.cpus];
        let into = values.as_mut_ptr().expose_provenance() as u64;
        match self.call(GET, address(key), into) {
            Ok(()) => Ok(Some(
                values
                    .chunks_exact(self.value)
                    .map(<[u8]>::to_vec)
                    .collect(),
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes an element. Values are cut to the map's size, or padded with zeroes.
    ///
    /// # Errors
    /// The kernel refuses: `E2BIG` if the map is full, or an array is too short; the key has another size.
    pub fn put(&self, key: &[u8], values: &[Vec<u8>]) -> io::Result<()> {
        self.fits(key)?;
        let mut all = vec![0; self.value * self.cpus];
        for (to, from) in all.chunks_exact_mut(self.value).zip(values) {
            let both = to.len().min(from.len());
            to[..both].copy_from_slice(&from[..both]);
        }
        self.call(PUT, address(key), address(&all))
    }

    fn fits(&self, key: &[u8]) -> io::Result<()> {
        match key.len() == self.key && self.value > 0 {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// `key` and `value` are the addresses of a key and of all its values; for `NEXT` those of a key, or 0,
    /// and of the next key.
    fn call(&self, command: libc::c_long, key: u64, value: u64) -> io::Result<()> {
        let attributes = Attributes {
            map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            padding: 0,
            key,
            value,
            flags: 0,
        };
        // SAFETY: the kernel reads the structure, whose size is given; and it reads and writes keys and
        // values of the sizes that it reported for this very map, for which the callers have room.
        let done = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                &raw const attributes,
                size_of::<Attributes>(),
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}
