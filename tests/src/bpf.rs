//! Access to an agent's pinned maps, and to the programs in a network namespace.

use std::cell::Cell;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
const BPF_LINK_DETACH: libc::c_long = 34;
/// `BPF_MAP_TYPE_HASH` of `enum bpf_map_type`.
const HASH: u64 = 1;
const ARRAY: u64 = 2;
/// `BPF_MAP_TYPE_LRU_HASH`.
const LRU: u64 = 9;

/// Returns the keys of a pinned hash table; `None` if something else is pinned there, or nothing any more.
pub fn keys(pin: &Path) -> Option<Vec<Vec<u8>>> {
    let read = || {
        let pinned = match open(pin) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            pinned => pinned?,
        };
        let Some(size) = key_size(&pinned)? else {
            return Ok(None);
        };
        let mut keys: Vec<Vec<u8>> = Vec::new();
        while let Some(key) = next(&pinned, keys.last(), size)? {
            keys.push(key);
        }
        Ok(Some(keys))
    };
    read().unwrap_or_else(|error: io::Error| panic!("{}: {error}", pin.display()))
}

/// Removes all entries of a pinned hash table; returns their number.
pub fn clear(pin: &Path) -> usize {
    #[repr(C)]
    struct Delete {
        map: u32,
        padding: u32,
        key: u64,
    }
    let keys = keys(pin).expect("a hash table");
    let pinned = open(pin).expect("a map");
    for key in &keys {
        let delete = Delete {
            map: pinned.as_raw_fd() as u32,
            padding: 0,
            key: key.as_ptr() as u64,
        };
        bpf(BPF_MAP_DELETE_ELEM, &delete).expect("a key");
    }
    keys.len()
}

/// Fills a pinned hash table with numbers as keys, and with zeroes for values of up to 32 bytes.
pub fn fill(pin: &Path) {
    let pinned = open(pin).expect("a map");
    let value = [0_u8; 32];
    for number in 0.. {
        let key = u64::MAX - number;
        let (key, value) = ((&raw const key) as u64, value.as_ptr() as u64);
        match element(BPF_MAP_UPDATE_ELEM, &pinned, key, value) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => return,
            done => _ = done.expect("a key of this size"),
        }
    }
}

/// Returns the capacity of a pinned map.
pub fn most(pin: &Path) -> u64 {
    let told = map_info(&open(pin).expect("a map")).expect("it is told");
    told("max_entries:").expect("of a map")
}

/// Returns the ID of a map, if one is pinned there.
pub fn id(pin: &Path) -> Option<u64> {
    open(pin)
        .ok()
        .and_then(|pinned| map_info(&pinned).ok()?("map_id:"))
}

/// Replaces a pinned map by one with `times` the capacity, and with its entries if they can be listed.
pub fn remake(pin: &Path, times: u32) {
    let old = open(pin).expect("a map");
    let told = map_info(&old).expect("it is told");
    let number = |name| told(name).expect("of a map");
    let sizes = [
        "map_type:",
        "key_size:",
        "value_size:",
        "max_entries:",
        "map_flags:",
    ];
    let [kind, key, value, most, flags] = sizes.map(|name| number(name) as u32);
    let new = create([kind, key, value, most * times, flags]);
    if [HASH, ARRAY].contains(&number("map_type:")) {
        let mut after = None;
        while let Some(found) = next(&old, after.as_ref(), key as usize).expect("a map") {
            let mut bytes = vec![0_u8; value as usize];
            let to = bytes.as_mut_ptr() as u64;
            element(BPF_MAP_LOOKUP_ELEM, &old, found.as_ptr() as u64, to).expect("an entry");
            element(BPF_MAP_UPDATE_ELEM, &new, found.as_ptr() as u64, to).expect("room");
            after = Some(found);
        }
    }
    fs::remove_file(pin).expect("a pin");
    pinned(&new, pin);
}

/// Pins an empty hash table, with keys of 8 bytes and values of 16.
pub fn hash(pin: &Path, most: u32) {
    pinned(&create([HASH as u32, 8, 16, most, 0]), pin);
}

/// Creates a map. `attributes` are its type, the sizes of keys and values, its capacity, and flags.
fn create(attributes: [u32; 5]) -> OwnedFd {
    let descriptor = bpf(BPF_MAP_CREATE, &attributes).expect("a map");
    // SAFETY: the kernel has made it for us alone.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

fn pinned(map: &OwnedFd, pin: &Path) {
    let path = CString::new(pin.as_os_str().as_bytes()).expect("a path");
    let put = Pinned {
        path: path.as_ptr() as u64,
        descriptor: map.as_raw_fd() as u32,
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &put).expect("nothing is there");
}

/// Detaches all links of the network namespace or cgroup with this inode number; returns their number.
pub fn detach(inode: u64) -> usize {
    /// The kernel's information about a link: its type, and its target.
    #[repr(C)]
    struct Info {
        kind: u32,
        ids: [u32; 3],
        target: u64,
        rest: [u64; 13],
    }
    #[repr(C)]
    struct Ask {
        descriptor: u32,
        size: u32,
        info: u64,
    }
    const CGROUP: u32 = 3;
    const NETNS: u32 = 5;
    let (mut id, mut count) = (0, 0);
    loop {
        let after = Cell::new([id, 0, 0]);
        match bpf(BPF_LINK_GET_NEXT_ID, &after) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return count,
            found => _ = found.expect("links are listed"),
        }
        id = after.into_inner()[1];
        let Ok(link) = bpf(BPF_LINK_GET_FD_BY_ID, &[id, 0, 0]) else {
            continue; // gone meanwhile
        };
        // SAFETY: the kernel has made it for us alone.
        let link = unsafe { OwnedFd::from_raw_fd(link) };
        let info = Cell::new(Info {
            kind: 0,
            ids: [0; 3],
            target: 0,
            rest: [0; 13],
        });
        let ask = Ask {
            descriptor: link.as_raw_fd() as u32,
            size: size_of::<Info>() as u32,
            info: info.as_ptr() as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &ask).expect("a link");
        let Info { kind, target, .. } = info.into_inner();
        if kind == CGROUP && target == inode || kind == NETNS && target as u32 as u64 == inode {
            bpf(BPF_LINK_DETACH, &[link.as_raw_fd() as u32, 0]).expect("it lets go");
            count += 1;
        }
    }
}

/// Returns the number of `sk_lookup` programs of a network namespace.
pub fn steering(netns: &File) -> u32 {
    /// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
    const SK_LOOKUP: u32 = 36;
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        flags: [u32; 2],
        ids: u64,
        count: u32,
        rest: [u32; 9],
    }
    let query = Query {
        target: netns.as_raw_fd() as u32,
        attach_type: SK_LOOKUP,
        flags: [0; 2],
        ids: 0,
        count: 0,
        rest: [0; 9],
    };
    let query = Cell::new(query);
    bpf(BPF_PROG_QUERY, &query).expect("a network namespace");
    query.into_inner().count
}

/// Runs a bpf(2) command on an element of a map.
fn element(what: libc::c_long, map: &OwnedFd, key: u64, value: u64) -> io::Result<i32> {
    #[repr(C)]
    struct Element {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let element = Element {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key,
        value,
        flags: 0,
    };
    bpf(what, &element)
}

fn key_size(pinned: &OwnedFd) -> io::Result<Option<usize>> {
    let told = map_info(pinned)?;
    let size = told("key_size:")
        .filter(|_| told("map_type:").is_some_and(|kind| [HASH, LRU].contains(&kind)));
    Ok(size.map(|size| size as usize))
}

/// Returns a look-up of numbers, by name, in the kernel's information about a descriptor.
fn map_info(pinned: &OwnedFd) -> io::Result<impl Fn(&str) -> Option<u64> + use<>> {
    let told = fs::read_to_string(format!("/proc/self/fdinfo/{}", pinned.as_raw_fd()))?;
    Ok(move |name: &str| {
        let found = told.lines().find_map(|line| line.strip_prefix(name))?;
        let found = found.trim();
        match found.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => found.parse().ok(),
        }
    })
}

/// Opens a pin, as any process may that sees the file system.
///
/// # Errors
/// Nothing is pinned there.
pub fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = Pinned {
        path: path.as_ptr() as u64,
        descriptor: 0,
        flags: 0,
    };
    let descriptor = bpf(BPF_OBJ_GET, &get)?;
    // SAFETY: the kernel has made it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The part of `union bpf_attr` for pins.
#[repr(C)]
struct Pinned {
    path: u64,
    descriptor: u32,
    flags: u32,
}

fn next(map: &OwnedFd, after: Option<&Vec<u8>>, size: usize) -> io::Result<Option<Vec<u8>>> {
    #[repr(C)]
    struct Next {
        map: u32,
        padding: u32,
        key: u64,
        next: u64,
    }
    let mut found = vec![0_u8; size];
    let next = Next {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key: after.map_or(0, |key| key.as_ptr() as u64),
        next: found.as_mut_ptr() as u64,
    };
    match bpf(BPF_MAP_GET_NEXT_KEY, &next) {
        Ok(_) => Ok(Some(found)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn bpf<T>(what: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are whole, and what they point to outlives the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            what,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(done) {
        Ok(done) if done >= 0 => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}
