//! What is in a kernel map, as bytes: aya asks for types, and of a map that somebody else has made
//! nobody here has them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{MapData, MapInfo, MapType};
use aya::util::nr_cpus;

/// `BPF_MAP_LOOKUP_ELEM`, `BPF_MAP_UPDATE_ELEM` and `BPF_MAP_GET_NEXT_KEY` of `enum bpf_cmd`.
const GET: libc::c_long = 1;
const PUT: libc::c_long = 2;
const NEXT: libc::c_long = 4;

/// Whether each CPU has a value of its own in maps of a kind.
pub fn is_per_cpu(kind: MapType) -> bool {
    use MapType::{LruPerCpuHash, PerCpuArray, PerCpuHash};
    matches!(kind, PerCpuHash | PerCpuArray | LruPerCpuHash)
}

/// The elements of a map whose keys can be listed.
#[derive(Debug)]
pub struct Elements<'a> {
    map: &'a MapData,
    key: usize,
    /// Of one CPU, as it lies in what the kernel is given.
    value: usize,
    cpus: usize,
    most: usize,
}

/// The part of `union bpf_attr` that an element has.
#[repr(C)]
struct Attributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<'a> Elements<'a> {
    /// As large as the kernel says that they are.
    ///
    /// # Errors
    /// The kernel does not tell, or this machine not how many CPUs it may have.
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

    /// All keys. What is put in meanwhile may be missed; where keys are removed, the kernel begins again,
    /// and some are found twice.
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

    /// The value of a key, for each CPU that has one of its own; none if the key is gone.
    ///
    /// # Errors
    /// The kernel refuses; the key is of another map.
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

    /// Puts an element in. Of each value as much is taken as there is room for, and what it lacks is 0.
    ///
    /// # Errors
    /// The kernel refuses: `E2BIG` where the map is full, or an array not so long; the key is of another
    /// map.
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

    /// `key` and `value` are addresses of as many bytes as a key and all values of it have here; at
    /// `NEXT`, of a key or 0, and of a key.
    fn call(&self, command: libc::c_long, key: u64, value: u64) -> io::Result<()> {
        let attributes = Attributes {
            map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            padding: 0,
            key,
            value,
            flags: 0,
        };
        // SAFETY: the kernel reads the structure, whose size is given; and it reads and writes keys and
        // values of the sizes that it told of this very map, for which the callers have room.
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
