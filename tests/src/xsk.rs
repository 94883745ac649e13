//! AF_XDP sockets in copy mode (Documentation/networking/af_xdp.rst), for the peer of a benchmark. An unsafe island.
//!
//! The kernel and this process share a piece of memory in chunks, and rings that say whose each chunk is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;

/// A chunk holds a frame of an Ethernet's MTU, behind 256 bytes of headroom.
const CHUNK: usize = 2048;
/// Chunks, and entries of each ring: a hold of 50 ms at 300,000 frames a second.
const CHUNKS: u32 = 16384;
/// The device's queue: a veth has one.
const QUEUE: u32 = 0;

/// Memory that is unmapped with this value.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is owned memory; who uses it answers for what is in it.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, fd: i32, offset: i64) -> io::Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// One ring with [`CHUNKS`] entries, seen from this process's end.
#[derive(Debug)]
struct Ring<T> {
    mapping: Mapping,
    offsets: libc::xdp_ring_offset,
    _entries: std::marker::PhantomData<T>,
}

impl<T: Copy> Ring<T> {
    fn new(
        fd: &OwnedFd,
        option: libc::c_int,
        offsets: libc::xdp_ring_offset,
        page_offset: u64,
    ) -> io::Result<Ring<T>> {
        set(fd, option, &CHUNKS)?;
        let len = offsets.desc as usize + CHUNKS as usize * size_of::<T>();
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Ok(Ring {
            mapping: Mapping::new(len, flags, fd.as_raw_fd(), page_offset as i64)?,
            offsets,
            _entries: std::marker::PhantomData,
        })
    }

    fn counter(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: the kernel says where in the mapping this aligned number is, and reads and writes it atomically.
        unsafe { &*self.mapping.start.as_ptr().add(offset as usize).cast() }
    }

    fn entry(&self, index: u32) -> *mut T {
        let at = (index & (CHUNKS - 1)) as usize;
        let first: *mut T = self
            .mapping
            .start
            .as_ptr()
            .wrapping_add(self.offsets.desc as usize)
            .cast();
        first.wrapping_add(at)
    }

    /// Gives the kernel an entry. There is room: a ring has as many entries as there are chunks.
    fn push(&mut self, entry: T) {
        let producer = self.counter(self.offsets.producer);
        let index = producer.load(Ordering::Relaxed);
        // SAFETY: within the mapping, and this end's until the counter has moved.
        unsafe { self.entry(index).write(entry) };
        producer.store(index.wrapping_add(1), Ordering::Release);
    }

    /// Takes an entry that the kernel has given.
    fn pop(&mut self) -> Option<T> {
        let consumer = self.counter(self.offsets.consumer);
        let index = consumer.load(Ordering::Relaxed);
        if index == self.counter(self.offsets.producer).load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: within the mapping, and this end's until the counter has moved.
        let entry = unsafe { self.entry(index).read() };
        consumer.store(index.wrapping_add(1), Ordering::Release);
        Some(entry)
    }
}

fn set<T>(fd: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value lives through the call, and has the size given.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket on one queue of a device in the calling thread's network namespace: it receives, or it sends.
#[derive(Debug)]
pub struct XdpSocket {
    fd: OwnedFd,
    memory: Mapping,
    /// Chunks for the kernel to fill.
    fill: Ring<u64>,
    /// Chunks that were sent.
    completion: Ring<u64>,
    /// Frames that came, or that are to be sent.
    frames: Ring<libc::xdp_desc>,
    /// A sender's chunks that nothing is in.
    free: Vec<u64>,
}

impl XdpSocket {
    /// One that gets what an XDP program redirects to it.
    ///
    /// # Errors
    /// Not root, or the device takes no such socket.
    pub fn receiver(device: &str) -> io::Result<XdpSocket> {
        let mut socket = Self::open(device, true)?;
        while let Some(chunk) = socket.free.pop() {
            socket.fill.push(chunk);
        }
        Ok(socket)
    }

    /// One that sends.
    ///
    /// # Errors
    /// As [`receiver`](Self::receiver).
    pub fn sender(device: &str) -> io::Result<XdpSocket> {
        Self::open(device, false)
    }

    fn open(device: &str, receives: bool) -> io::Result<XdpSocket> {
        let ifindex = nix::net::if_::if_nametoindex(device)?;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: makes a descriptor and touches no memory.
        let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given it to the caller.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let memory = Mapping::new(CHUNKS as usize * CHUNK, flags, -1, 0)?;
        let region = libc::xdp_umem_reg {
            addr: memory.start.as_ptr() as u64,
            len: memory.len as u64,
            chunk_size: CHUNK as u32,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        set(&fd, libc::XDP_UMEM_REG, &region)?;
        let offsets = offsets(&fd)?;
        let fill = Ring::new(
            &fd,
            libc::XDP_UMEM_FILL_RING,
            offsets.fr,
            libc::XDP_UMEM_PGOFF_FILL_RING,
        )?;
        let completion = Ring::new(
            &fd,
            libc::XDP_UMEM_COMPLETION_RING,
            offsets.cr,
            libc::XDP_UMEM_PGOFF_COMPLETION_RING,
        )?;
        let (option, offsets, page_offset) = match receives {
            true => (libc::XDP_RX_RING, offsets.rx, libc::XDP_PGOFF_RX_RING),
            false => (libc::XDP_TX_RING, offsets.tx, libc::XDP_PGOFF_TX_RING),
        };
        let frames = Ring::new(&fd, option, offsets, page_offset as u64)?;
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: libc::XDP_COPY,
            sxdp_ifindex: ifindex,
            sxdp_queue_id: QUEUE,
            sxdp_shared_umem_fd: 0,
        };
        // SAFETY: the address lives through the call, and its size is the one given.
        let result = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(XdpSocket {
            fd,
            memory,
            fill,
            completion,
            frames,
            free: (0..CHUNKS).map(|n| u64::from(n) * CHUNK as u64).collect(),
        })
    }

    /// Hands every frame that is there to `take`, and returns how many there were.
    pub fn receive(&mut self, mut take: impl FnMut(&[u8])) -> usize {
        let mut count = 0;
        while let Some(frame) = self.frames.pop() {
            let start = self.memory.start.as_ptr().wrapping_add(frame.addr as usize);
            // SAFETY: the kernel has filled these bytes of the memory, and they are ours until the chunk is in the fill ring.
            take(unsafe { std::slice::from_raw_parts(start, frame.len as usize) });
            self.fill.push(frame.addr & !(CHUNK as u64 - 1));
            count += 1;
        }
        count
    }

    /// Queues a frame; [`flush`](Self::flush) sees to the rest.
    ///
    /// # Errors
    /// As those of `flush`, when all chunks are on their way; or the frame is longer than a chunk.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        if frame.len() > CHUNK {
            return Err(Errno::EMSGSIZE.into());
        }
        let chunk = loop {
            match self.free.pop() {
                Some(chunk) => break chunk,
                None => self.kick()?,
            }
        };
        let start = self.memory.start.as_ptr().wrapping_add(chunk as usize);
        // SAFETY: a chunk of the memory that nobody uses, at least as long as the frame.
        unsafe { std::ptr::copy_nonoverlapping(frame.as_ptr(), start, frame.len()) };
        self.frames.push(libc::xdp_desc {
            addr: chunk,
            len: frame.len() as u32,
            options: 0,
        });
        Ok(())
    }

    /// Until every queued frame has been given to the device.
    ///
    /// # Errors
    /// The device is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.free.len() < CHUNKS as usize {
            self.kick()?;
        }
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        let (fd, none) = (self.fd.as_raw_fd(), std::ptr::null());
        // SAFETY: an empty message without an address: no memory is read.
        let result = unsafe { libc::sendto(fd, none, 0, libc::MSG_DONTWAIT, none.cast(), 0) };
        if result < 0 {
            match Errno::last() {
                // Only so many at a time, or the device is busy.
                Errno::EAGAIN | Errno::EBUSY | Errno::ENOBUFS | Errno::EINTR => {}
                errno => return Err(errno.into()),
            }
        }
        while let Some(chunk) = self.completion.pop() {
            self.free.push(chunk);
        }
        Ok(())
    }
}

fn offsets(fd: &OwnedFd) -> io::Result<libc::xdp_mmap_offsets> {
    // SAFETY: plain old data: all zeroes are a valid value.
    let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&offsets) as libc::socklen_t;
    // SAFETY: both live through the call, and the length is that of the first.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_MMAP_OFFSETS,
            (&raw mut offsets).cast(),
            &raw mut len,
        )
    };
    if result < 0 || len as usize != size_of_val(&offsets) {
        return Err(io::Error::last_os_error());
    }
    Ok(offsets)
}

impl AsFd for XdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
