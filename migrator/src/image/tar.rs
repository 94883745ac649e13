//! A tar stream, read entry by entry from an untrusted source.
//!
//! The `tar` crate decodes the header blocks; the extensions (PAX, GNU long names) are read here, because
//! their sizes must be bounded before they are held in memory, and because a PAX value may be binary: an
//! extended attribute may hold a newline.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::pax::Extensions;

/// Unit of a tar stream, in bytes (POSIX.1-2017, pax, "ustar Interchange Format").
const BLOCK: usize = 512;

/// Longest GNU long name or link, in bytes: PATH_MAX is 4096.
const MAX_LONG_NAME: u64 = 8 << 10;

/// Longest PAX header, in bytes: a few extended attributes of the kernel's maximum (64 KiB, XATTR_SIZE_MAX).
const MAX_PAX: u64 = 1 << 20;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice,
    BlockDevice,
    Fifo,
}

/// One entry. Its content is read from the [`TarReader`] that gave it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    /// Target of a symlink or hard link.
    pub(super) link: Vec<u8>,
    /// The lower 12 bits of st_mode.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Modification time: seconds since 1970, never negative, and nanoseconds.
    pub(super) mtime: (i64, u32),
    /// Bytes of content.
    pub(super) size: u64,
    /// Device number: major and minor.
    pub(super) device: (u32, u32),
    /// Extended attributes: full name (`security.capability`) and value.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// The path for a message.
    pub(super) fn shown(&self) -> String {
        shown(&self.path)
    }
}

/// A path from an archive, for a message: no control characters, and not without end.
pub(super) fn shown(path: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(path).chars().take(300).collect();
    text.escape_debug().to_string()
}

/// Why a tar stream is not read further.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// Reading or decompressing failed.
    #[error("the archive cannot be read at byte {at}")]
    Read {
        /// Offset in the uncompressed stream.
        at: u64,
        /// The error.
        source: io::Error,
    },
    /// The stream ends inside an entry.
    #[error("the archive is cut short at byte {at}")]
    Truncated {
        /// Offset in the uncompressed stream.
        at: u64,
    },
    /// Bytes that are not a tar header.
    #[error("the archive is damaged at byte {at}: {what}")]
    Damaged {
        /// Offset in the uncompressed stream.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A kind of entry that images do not have.
    #[error("`{path}` is {what}, which is not supported")]
    Unsupported {
        /// The entry.
        path: String,
        /// Its kind.
        what: &'static str,
    },
}

/// Reads a tar stream. `Read` gives the content of the current entry.
pub(super) struct TarReader<R> {
    inner: R,
    /// Bytes consumed.
    at: u64,
    /// Bytes of content left in the current entry.
    left: u64,
    /// Bytes of padding behind it.
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            at: 0,
            left: 0,
            padding: 0,
        }
    }

    /// Bytes consumed so far: right after [`TarReader::next_entry`], the offset of the entry's content.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// The next entry, or `None` at the end of the archive. What is left of the entry before it is skipped.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut ext = Extensions::default();
        loop {
            self.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let at = self.at;
            let damaged = |what| TarError::Damaged { at, what };
            let Some(block) = self.block()? else {
                return Ok(None);
            };
            if block.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check_sum(&block).map_err(damaged)?;
            let size = header.entry_size().map_err(|_| damaged("bad size"))?;
            let kind = header.entry_type();
            match kind {
                EntryType::GNULongName => ext.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => ext.link = Some(self.long_name(size)?),
                EntryType::XHeader => {
                    let records = self.small(size, MAX_PAX, "PAX header too long")?;
                    ext.read(&records).map_err(damaged)?;
                }
                // Global headers carry comments (git archive); no tool that writes layers uses them for more.
                EntryType::XGlobalHeader => self.set_content(size),
                _ => {
                    let size = ext.size.unwrap_or(size);
                    let entry = entry(header, ext, size).map_err(|problem| match problem {
                        Problem::Damaged(what) => damaged(what),
                        Problem::Unsupported(path, what) => TarError::Unsupported { path, what },
                    })?;
                    self.set_content(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads what follows the archive's end, so that a digest over the stream covers it.
    pub(super) fn drain(&mut self) -> Result<(), TarError> {
        let at = self.at;
        io::copy(&mut self.inner, &mut io::sink())
            .map_err(|source| TarError::Read { at, source })?;
        Ok(())
    }

    fn set_content(&mut self, size: u64) {
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// A header block; `None` if the stream ends here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated { at: self.at }),
                Ok(n) => {
                    filled += n;
                    self.at += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(TarError::Read {
                        at: self.at,
                        source,
                    });
                }
            }
        }
        Ok(Some(block))
    }

    /// The whole content of an extension header, no longer than `max`.
    fn small(&mut self, size: u64, max: u64, what: &'static str) -> Result<Vec<u8>, TarError> {
        if size > max {
            return Err(TarError::Damaged { at: self.at, what });
        }
        self.set_content(size);
        let mut bytes = vec![0u8; size as usize];
        let at = self.at;
        self.read_exact(&mut bytes)
            .map_err(|source| read_error(at, source))?;
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut name = self.small(size, MAX_LONG_NAME, "name too long")?;
        let end = name.iter().position(|&byte| byte == 0);
        name.truncate(end.unwrap_or(name.len()));
        Ok(name)
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        let at = self.at;
        let skipped = io::copy(&mut self.inner.by_ref().take(count), &mut io::sink())
            .map_err(|source| TarError::Read { at, source })?;
        self.at += skipped;
        if skipped < count {
            return Err(TarError::Truncated { at: self.at });
        }
        Ok(())
    }
}

fn read_error(at: u64, source: io::Error) -> TarError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        TarError::Truncated { at }
    } else {
        TarError::Read { at, source }
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buf[..want])?;
        if n == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive is cut short",
            ));
        }
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Checks the header's sum: all bytes, with the field itself taken as spaces.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), &'static str> {
    const FIELD: std::ops::Range<usize> = 148..156;
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(i, &byte)| u32::from(if FIELD.contains(&i) { b' ' } else { byte }))
        .sum();
    match Header::from_byte_slice(block).cksum() {
        Ok(stated) if stated == sum => Ok(()),
        _ => Err("this is not a tar header"),
    }
}

enum Problem {
    Damaged(&'static str),
    Unsupported(String, &'static str),
}

fn entry(header: &Header, ext: Extensions, size: u64) -> Result<Entry, Problem> {
    let path = ext.path.unwrap_or_else(|| header.path_bytes().into_owned());
    let link = ext
        .link
        .or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
    let unsupported = |what| Problem::Unsupported(shown(&path), what);
    let kind = match header.entry_type() {
        // A tar from before POSIX marks a directory by the slash at its end.
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Char => Kind::CharDevice,
        EntryType::Block => Kind::BlockDevice,
        EntryType::Fifo => Kind::Fifo,
        EntryType::GNUSparse => return Err(unsupported("a sparse file")),
        _ => return Err(unsupported("of an unknown type")),
    };
    if ext.sparse {
        return Err(unsupported("a sparse file"));
    }
    let id = |known: Option<u32>, field: io::Result<u64>, what| match known {
        Some(id) => Ok(id),
        None => field
            .ok()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or(Problem::Damaged(what)),
    };
    let device = |field: io::Result<Option<u32>>| {
        field
            .map(Option::unwrap_or_default)
            .map_err(|_| Problem::Damaged("bad device number"))
    };
    let device = match kind {
        Kind::CharDevice | Kind::BlockDevice => (
            device(header.device_major())?,
            device(header.device_minor())?,
        ),
        Kind::File | Kind::Directory | Kind::Symlink | Kind::HardLink | Kind::Fifo => (0, 0),
    };
    Ok(Entry {
        kind,
        link: link.unwrap_or_default(),
        mode: header.mode().map_err(|_| Problem::Damaged("bad mode"))? & 0o7777,
        uid: id(ext.uid, header.uid(), "bad uid")?,
        gid: id(ext.gid, header.gid(), "bad gid")?,
        // A time before 1970 (negative, in base 256) becomes 0: no file system here needs it.
        mtime: ext.mtime.unwrap_or_else(|| {
            let seconds = header
                .mtime()
                .ok()
                .and_then(|time| i64::try_from(time).ok());
            (seconds.unwrap_or(0), 0)
        }),
        // Links and directories have no content, whatever their size says (old tars state the target's).
        size: match kind {
            Kind::File => size,
            Kind::Directory | Kind::Symlink | Kind::HardLink => 0,
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => 0,
        },
        device,
        xattrs: ext.xattrs,
        path,
    })
}
