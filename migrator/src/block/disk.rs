//! A disk: a file, what was written to it, and what is not here yet.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc;

use super::DiskError;
use super::admission::{Admission, Admitted, Quiet};
use super::backing::Backing;
use super::dirty::{Dirty, Generation, StaleGeneration};
use super::granule::{Extent, GRANULE, check_size};
use super::limit::{Limit, Shared};
use super::missing::Missing;
use super::pipe::Pipe;

/// A writable disk. Its calls block; any number of threads may make them at once.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    size: u64,
    /// Empty until a disk that comes [later](Disk::later) has come.
    backing: OnceLock<Backing>,
    dirty: Arc<Dirty>,
    limit: Limit,
    missing: Missing,
    admission: Arc<Admission>,
    /// A write found the file system full since somebody asked last.
    starved: AtomicBool,
}

/// What became of a granule that was supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supplied {
    /// It is in the file.
    Placed,
    /// It was not missing (any more): the guest has overwritten it, or it came twice.
    AlreadyHere,
}

impl Disk {
    /// Makes a disk that is one hole; the file must not be there.
    ///
    /// # Errors
    /// The size is wrong, or the file cannot be made.
    pub fn create(path: &Path, size: u64) -> Result<Self, DiskError> {
        check_size(size)?;
        let backing = Backing::create(path, size).map_err(file("make", path))?;
        Ok(Self::with(path, size, OnceLock::from(backing)))
    }

    /// A disk that another node still writes to: its file is opened by [`Disk::arrive`], and not looked at before. Until then it reads as
    /// zeros, which is what a VMM may do that awaits its state, and takes no write.
    ///
    /// # Errors
    /// The size is wrong.
    pub fn later(path: &Path, size: u64) -> Result<Self, DiskError> {
        check_size(size)?;
        Ok(Self::with(path, size, OnceLock::new()))
    }

    /// Opens the file of a disk that comes later: nobody else writes to it any more. Does nothing if it has come.
    ///
    /// # Errors
    /// The file is not there, cannot be opened, or has another size.
    pub fn arrive(&self) -> Result<(), DiskError> {
        if self.backing.get().is_some() {
            return Ok(());
        }
        let backing = Backing::open(&self.path).map_err(file("open", &self.path))?;
        let size = backing.len().map_err(file("ask the size of", &self.path))?;
        if size != self.size {
            return Err(DiskError::Size { size });
        }
        // Of two that open it at once, one is kept.
        let _ = self.backing.set(backing);
        Ok(())
    }

    fn backing(&self) -> Result<&Backing, DiskError> {
        self.backing.get().ok_or(DiskError::NotHere)
    }

    /// Opens a disk. Nothing of it is missing, and nothing is known to be dirty.
    ///
    /// # Errors
    /// The file is not there, cannot be opened, or has a size that is none of a disk.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let backing = Backing::open(path).map_err(file("open", path))?;
        let size = backing.len().map_err(file("ask the size of", path))?;
        check_size(size)?;
        Ok(Self::with(path, size, OnceLock::from(backing)))
    }

    fn with(path: &Path, size: u64, backing: OnceLock<Backing>) -> Self {
        Self {
            path: path.to_owned(),
            size,
            backing,
            dirty: Arc::new(Dirty::new(size)),
            limit: Limit::default(),
            missing: Missing::none(),
            admission: Arc::default(),
            starved: AtomicBool::new(false),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes, a multiple of [`GRANULE`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the file takes on its file system, in bytes.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn allocated_bytes(&self) -> Result<u64, DiskError> {
        self.backing()?
            .allocated_bytes()
            .map_err(file("ask the size of", &self.path))
    }

    /// What is not a hole, in order: everything else reads as zeros. What is written while this looks may be missed, so start tracking
    /// first.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn allocated(&self) -> Result<Vec<Extent>, DiskError> {
        self.backing()?
            .data()
            .map_err(file("list the data of", &self.path))
    }

    /// Fills `data` from `offset` on. Waits for granules that are missing.
    ///
    /// # Errors
    /// Beyond the end, a read error, or closed while waiting.
    pub fn read_at(&self, data: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let extent = self.extent(offset, data.len() as u64)?;
        self.missing.need(extent)?;
        match self.backing.get() {
            Some(backing) => backing.read(data, offset).map_err(io("read", extent)),
            None => {
                data.fill(0);
                Ok(())
            }
        }
    }

    /// Fills `data` from `offset` on, without waiting for anything. False: that cannot be, ask with [`Disk::read_at`].
    pub fn read_now(&self, data: &mut [u8], offset: u64) -> bool {
        self.extent(offset, data.len() as u64).is_ok()
            && self.missing.is_empty()
            && self
                .backing
                .get()
                .is_some_and(|backing| backing.read_cached(data, offset))
    }

    /// Takes `len` bytes from `offset` on into an empty pipe that they fit; as [`Disk::read_at`]. What is written meanwhile, and until
    /// they leave the pipe, may be seen or not. False: the file system has no pages to give, and the pipe is empty.
    ///
    /// # Errors
    /// As for [`Disk::read_at`]. The pipe is of no more use then.
    pub fn read_into(&self, pipe: &Pipe, offset: u64, len: usize) -> Result<bool, DiskError> {
        let extent = self.extent(offset, len as u64)?;
        self.missing.need(extent)?;
        let Some(backing) = self.backing.get() else {
            return Ok(false);
        };
        match pipe.fill(&backing.file, offset, len) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(false),
            Err(error) => Err(io("read", extent)(error)),
        }
    }

    /// Whether a request waits for no more than the file: nothing is missing, and writes are not limited.
    pub fn is_free(&self) -> bool {
        self.missing.is_empty() && self.limit.is_none()
    }

    /// Writes `data` at `offset`. Waits for granules that are missing, if it does not overwrite them whole.
    ///
    /// # Errors
    /// Beyond the end, a write error (a part may be written), or closed while waiting.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        let extent = self.extent(offset, data.len() as u64)?;
        self.change(extent, || {
            self.backing()?
                .write(data, offset)
                .map_err(io("write", extent))
        })
    }

    /// Makes a range read as zeros; as a hole, unless `keep_room`.
    ///
    /// # Errors
    /// As for [`Disk::write_at`].
    pub fn zero(&self, offset: u64, len: u64, keep_room: bool) -> Result<(), DiskError> {
        let extent = self.extent(offset, len)?;
        self.change(extent, || {
            let backing = self.backing()?;
            let zeroed = match keep_room {
                true => backing.zero_in_place(extent),
                false => match backing.punch(extent) {
                    Ok(true) => Ok(()),
                    Ok(false) => backing.write_zeros(extent),
                    Err(error) => Err(error),
                },
            };
            zeroed.map_err(io("zero", extent))
        })
    }

    /// Gives a range back to the file system; it reads as zeros then, or as before where that has no holes.
    ///
    /// # Errors
    /// As for [`Disk::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let extent = self.extent(offset, len)?;
        self.change(extent, || {
            self.backing()?
                .punch(extent)
                .map(drop)
                .map_err(io("discard", extent))
        })
    }

    /// Makes everything that was written durable: after this returns, a power cut keeps it.
    ///
    /// # Errors
    /// The device did not take it. What was written since the last flush may be lost then.
    pub fn flush(&self) -> Result<(), DiskError> {
        match self.backing.get() {
            Some(backing) => backing.sync().map_err(file("flush", &self.path)),
            // Nothing was written.
            None => Ok(()),
        }
    }

    /// Begins to write to the device what a flush would wait for.
    pub fn begin_writeback(&self) {
        if let Some(backing) = self.backing.get() {
            backing.begin_writeback();
        }
    }

    /// Forgets which granules were written, and begins to remember those that are from now on.
    pub fn start_tracking(&self) -> Generation {
        self.dirty.start()
    }

    /// Which granules were written since [`Disk::start_tracking`] or the take before; in order, neighbours joined. Read them after this:
    /// see the [module's rule](super).
    ///
    /// # Errors
    /// [`StaleGeneration`]: somebody else tracks by now.
    pub fn take_dirty(&self, generation: Generation) -> Result<Vec<Extent>, StaleGeneration> {
        let taken = self.dirty.take(generation);
        self.limit.changed();
        taken
    }

    /// Has writes to any of these disks wait while their dirty granules have more than so many bytes together, until a take, another
    /// limit, or `None`: none.
    pub fn limit_dirty(disks: &[Arc<Self>], bytes: Option<u64>) {
        let of = || disks.iter().map(|disk| Arc::clone(&disk.dirty)).collect();
        let limit = bytes.map(|bytes| Arc::new(Shared::new(bytes, of())));
        for disk in disks {
            disk.limit.set(limit.clone());
        }
    }

    /// Bytes of the granules that a take would give now.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.bytes()
    }

    /// Begins a client's request, which is under way until the guard is dropped. Waits while requests are held up.
    ///
    /// # Errors
    /// [`DiskError::Closed`].
    pub fn admit(&self) -> Result<Admitted<'_>, DiskError> {
        self.admission.admit()
    }

    /// Holds new requests of clients up, and waits until none is under way. They go on when the guard is dropped. The mover's own calls
    /// are no requests: they are not held up.
    ///
    /// # Errors
    /// [`DiskError::Busy`]: they did not end in time; nothing is held up then.
    pub fn quiesce(&self, within: Duration) -> Result<Quiet, DiskError> {
        self.admission.quiesce(within)
    }

    /// Serves no more requests: those that wait, for a granule or in a hold, and new ones, end with [`DiskError::Closed`]. For ever.
    pub fn close(&self) {
        self.admission.close();
        self.limit.changed();
        self.missing.close();
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.admission.is_closed()
    }

    /// Says which parts are not here yet (whole granules; each that an extent touches). Call it before a client may read. Tells, each
    /// once, which granules a request waits for. Calling it again replaces the set, and who waits asks anew.
    ///
    /// # Errors
    /// An extent is beyond the end.
    pub fn expect(&self, missing: &[Extent]) -> Result<mpsc::UnboundedReceiver<Extent>, DiskError> {
        for extent in missing {
            self.extent(extent.offset, extent.len)?;
        }
        Ok(self.missing.expect(self.size, missing))
    }

    /// Puts a granule in its place that was missing: its [`GRANULE`] bytes, or `None` if it is all zeros. A granule that is not missing
    /// is left as it is: the guest's own data is newer.
    ///
    /// # Errors
    /// `offset` is not that of a granule, `data` has not its length, or a write error: it is missing then as before.
    pub fn supply(&self, offset: u64, data: Option<&[u8]>) -> Result<Supplied, DiskError> {
        let extent = self.extent(offset, GRANULE)?;
        let wrong = data.is_some_and(|data| data.len() as u64 != GRANULE);
        if !offset.is_multiple_of(GRANULE) || wrong {
            return Err(DiskError::Range {
                offset,
                len: data.map_or(GRANULE, |data| data.len() as u64),
                size: self.size,
            });
        }
        let place = || match data {
            Some(data) => self
                .backing()?
                .write(data, offset)
                .map_err(io("write", extent)),
            None => match self.backing()?.punch(extent) {
                Ok(true) => Ok(()),
                Ok(false) => self
                    .backing()?
                    .write_zeros(extent)
                    .map_err(io("zero", extent)),
                Err(source) => Err(io("zero", extent)(source)),
            },
        };
        let placed = self.missing.supply(offset / GRANULE, place)?;
        Ok(match placed {
            true => Supplied::Placed,
            false => Supplied::AlreadyHere,
        })
    }

    /// What is missing, in order.
    pub fn missing(&self) -> Vec<Extent> {
        self.missing.extents()
    }

    /// How many bytes are missing.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.bytes()
    }

    /// Whether a write found the file system full since the last call.
    pub fn take_starved(&self) -> bool {
        self.starved.swap(false, Ordering::Relaxed)
    }

    /// A change of the range: waits for what it needs, and marks it dirty, also if it failed half way.
    fn change(
        &self,
        extent: Extent,
        change: impl FnOnce() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        self.limit.wait(|| self.is_closed())?;
        let changed = self.missing.overwrite(extent, change);
        self.dirty.mark(extent);
        if let Err(error) = &changed
            && error.is_full()
        {
            self.starved.store(true, Ordering::Relaxed);
        }
        changed
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, DiskError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(Extent { offset, len }),
            Some(_) | None => Err(DiskError::Range {
                offset,
                len,
                size: self.size,
            }),
        }
    }
}

fn file(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DiskError {
    move |source| DiskError::File {
        verb,
        path: path.to_owned(),
        source,
    }
}

fn io(verb: &'static str, extent: Extent) -> impl FnOnce(std::io::Error) -> DiskError {
    move |source| DiskError::Io {
        verb,
        offset: extent.offset,
        len: extent.len,
        source,
    }
}
