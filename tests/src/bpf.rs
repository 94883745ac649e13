//! XDP programs of a few instructions, for benchmarks that need another one than the product's. An unsafe island: system calls of bpf(2).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// linux/bpf.h, `enum bpf_cmd`.
const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const PROG_TEST_RUN: libc::c_long = 10;
const LINK_CREATE: libc::c_long = 28;
/// `enum bpf_prog_type` and `enum bpf_attach_type`.
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
/// linux/if_link.h: in the driver, so natively.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`.
const LIVE_FRAMES: u32 = 1 << 1;
/// `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
type XdpMd = [u32; 6];

/// Of `enum bpf_map_type`, those that are used.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum MapType {
    /// Values by index.
    Array = 2,
    /// Devices by receive queue.
    Dev = 14,
    /// AF_XDP sockets by receive queue.
    Xsk = 17,
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _pad: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

const _: () = assert!(size_of::<MapCreate>() == 16);
const _: () = assert!(size_of::<Element>() == 32);
const _: () = assert!(size_of::<ProgLoad>() == 40);
const _: () = assert!(size_of::<TestRun>() == 80);
const _: () = assert!(size_of::<LinkCreate>() == 16);

/// What the kernel does with `command` and its attributes; a descriptor for some.
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes live through the call and have the size given; each caller's pointers in them live as long.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn descriptor(result: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just given this descriptor to the caller.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd() as u32
}

/// A map with keys of four bytes.
#[derive(Debug)]
pub struct Map<const VALUE: usize>(OwnedFd);

impl<const VALUE: usize> Map<VALUE> {
    /// Makes one with values of `VALUE` bytes.
    ///
    /// # Errors
    /// The kernel lacks the type.
    pub fn new(map_type: MapType, entries: u32) -> io::Result<Self> {
        let mut attributes = MapCreate {
            map_type: map_type as u32,
            key_size: 4,
            value_size: VALUE as u32,
            max_entries: entries,
        };
        bpf(MAP_CREATE, &mut attributes).map(|fd| Self(descriptor(fd)))
    }

    /// Stores a value.
    ///
    /// # Errors
    /// There is no such key, or the map takes no such value.
    pub fn set(&self, key: u32, value: [u8; VALUE]) -> io::Result<()> {
        let mut attributes = Element {
            map_fd: number(&self.0),
            _pad: 0,
            key: (&raw const key) as u64,
            value: value.as_ptr() as u64,
            flags: 0,
        };
        bpf(MAP_UPDATE_ELEM, &mut attributes).map(drop)
    }

    /// Its value.
    ///
    /// # Errors
    /// There is no such key.
    pub fn get(&self, key: u32) -> io::Result<[u8; VALUE]> {
        let mut value = [0; VALUE];
        let mut attributes = Element {
            map_fd: number(&self.0),
            _pad: 0,
            key: (&raw const key) as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        bpf(MAP_LOOKUP_ELEM, &mut attributes)?;
        Ok(value)
    }
}

impl<const VALUE: usize> AsFd for Map<VALUE> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An instruction, `struct bpf_insn`: code, destination and source register, offset, immediate.
pub const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

/// The number of a map in a program that names it.
pub fn immediate(map: &impl AsFd) -> i32 {
    map.as_fd().as_raw_fd()
}

/// A loaded XDP program.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// A program on a device, until it is dropped.
#[derive(Debug)]
pub struct Attached(#[expect(dead_code, reason = "held for its drop")] OwnedFd);

impl Program {
    /// Loads it.
    ///
    /// # Errors
    /// The verifier refuses it: then with what it says.
    pub fn load(instructions: &[u64]) -> io::Result<Self> {
        const LICENSE: &CStr = c"GPL";
        let load = |log: &mut [u8]| {
            let mut attributes = ProgLoad {
                prog_type: PROG_TYPE_XDP,
                insn_cnt: instructions.len() as u32,
                insns: instructions.as_ptr() as u64,
                license: LICENSE.as_ptr() as u64,
                log_level: u32::from(!log.is_empty()),
                log_size: log.len() as u32,
                log_buf: if log.is_empty() {
                    0
                } else {
                    log.as_mut_ptr() as u64
                },
            };
            bpf(PROG_LOAD, &mut attributes)
        };
        match load(&mut []) {
            Ok(fd) => Ok(Self(descriptor(fd))),
            Err(error) => {
                let mut log = vec![0; 1 << 16];
                // Fails again; what counts is what it says.
                let _ = load(&mut log);
                let said = String::from_utf8_lossy(&log);
                let said = said.trim_end_matches('\0');
                Err(io::Error::new(error.kind(), format!("{error}: {said}")))
            }
        }
    }

    /// Puts it on a device of the calling thread's network namespace, natively.
    ///
    /// # Errors
    /// The device takes none, or has another one.
    pub fn attach(&self, ifindex: u32) -> io::Result<Attached> {
        let mut attributes = LinkCreate {
            prog_fd: number(&self.0),
            target_ifindex: ifindex,
            attach_type: ATTACH_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        };
        bpf(LINK_CREATE, &mut attributes).map(|fd| Attached(descriptor(fd)))
    }

    /// Runs it on `count` copies of a frame as if the device had received them, `batch` at a time
    /// (Documentation/bpf/bpf_prog_run.rst): they go where it says.
    ///
    /// # Errors
    /// The kernel does not make them.
    pub fn live(&self, frame: &[u8], ifindex: u32, count: u32, batch: u32) -> io::Result<()> {
        let context: XdpMd = [0, frame.len() as u32, 0, ifindex, 0, 0];
        let mut attributes = TestRun {
            prog_fd: number(&self.0),
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat: count,
            ctx_size_in: size_of::<XdpMd>() as u32,
            ctx_in: context.as_ptr() as u64,
            flags: LIVE_FRAMES,
            batch_size: batch,
            ..TestRun::default()
        };
        bpf(PROG_TEST_RUN, &mut attributes).map(drop)
    }
}
