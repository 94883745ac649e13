//! Where an image is read from: a directory, or one file in tar format, compressed or not.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::compression::{Compression, decompress};
use super::tar::{Kind, TarError, TarReader};

/// Most entries of an archive of blobs: an image has at most a few hundred layers.
const MAX_MEMBERS: usize = 100_000;

/// Links within an archive that are followed before giving up (`docker save` links repeated layers).
const MAX_LINKS: u32 = 8;

/// Why a file of the image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The path itself.
    #[error("cannot open {path}")]
    Open {
        /// The path given.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Neither a file nor a directory.
    #[error("{path} is neither a file nor a directory")]
    Kind {
        /// The path given.
        path: PathBuf,
    },
    /// The archive.
    #[error("{path} is not a readable tar archive")]
    Archive {
        /// The path given.
        path: PathBuf,
        /// The error.
        source: TarError,
    },
    /// The archive could not be uncompressed.
    #[error("cannot uncompress {path}")]
    Uncompress {
        /// The path given.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// More files than any image.
    #[error("{path} has more than {MAX_MEMBERS} files: it is not an image archive")]
    TooManyMembers {
        /// The path given.
        path: PathBuf,
    },
    /// A file that the image refers to.
    #[error("the image has no file `{name}`")]
    Missing {
        /// Its name in the image.
        name: String,
    },
    /// A file that the image refers to.
    #[error("cannot read `{name}`")]
    Read {
        /// Its name in the image.
        name: String,
        /// The error.
        source: io::Error,
    },
    /// A JSON file of an absurd size.
    #[error("`{name}` has {size} bytes, more than the limit of {limit}")]
    TooLong {
        /// Its name in the image.
        name: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
}

/// An opened image.
pub(super) enum Source {
    /// An OCI layout.
    Directory(PathBuf),
    /// An archive, uncompressed.
    Archive {
        file: File,
        members: HashMap<String, Member>,
    },
}

/// A member of an archive.
pub(super) enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

/// A file of the image.
pub(super) struct Blob {
    file: File,
    offset: u64,
    left: u64,
}

impl Blob {
    /// Bytes left to read.
    pub(super) fn size(&self) -> u64 {
        self.left
    }
}

impl Read for Blob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..want], self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Opens a file without waiting for a writer if it is a FIFO.
fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
}

impl Source {
    /// Opens `path`. A compressed archive is uncompressed into the folder `scratch`, to no more than `limit`
    /// bytes.
    pub(super) fn open(path: &Path, scratch: &Path, limit: u64) -> Result<Self, SourceError> {
        let own = || path.to_owned();
        let open = |source| SourceError::Open {
            path: own(),
            source,
        };
        let file = open_file(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        if metadata.is_dir() {
            return Ok(Self::Directory(own()));
        }
        if !metadata.is_file() {
            return Err(SourceError::Kind { path: own() });
        }
        let uncompress = |source| SourceError::Uncompress {
            path: own(),
            source,
        };
        let (compression, mut stream) = decompress(&file, limit).map_err(uncompress)?;
        let file = match compression {
            Compression::None => {
                drop(stream);
                file
            }
            Compression::Gzip | Compression::Zstd => {
                let mut plain = tempfile::tempfile_in(scratch).map_err(uncompress)?;
                io::copy(&mut stream, &mut plain).map_err(uncompress)?;
                plain.flush().map_err(uncompress)?;
                plain
            }
        };
        let members = index(&file).map_err(|source| SourceError::Archive {
            path: own(),
            source,
        })?;
        let members = members.ok_or_else(|| SourceError::TooManyMembers { path: own() })?;
        Ok(Self::Archive { file, members })
    }

    /// Opens a file of the image.
    pub(super) fn blob(&self, name: &str) -> Result<Blob, SourceError> {
        let missing = || SourceError::Missing {
            name: name.to_owned(),
        };
        let read = |source| SourceError::Read {
            name: name.to_owned(),
            source,
        };
        match self {
            Self::Directory(path) => {
                let file = match open_file(&path.join(name)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
                    result => result.map_err(read)?,
                };
                let metadata = file.metadata().map_err(read)?;
                if !metadata.is_file() {
                    return Err(missing());
                }
                let left = metadata.len();
                Ok(Blob {
                    file,
                    offset: 0,
                    left,
                })
            }
            Self::Archive { file, members } => {
                let mut name = name.to_owned();
                for _ in 0..MAX_LINKS {
                    match members.get(&name).ok_or_else(missing)? {
                        Member::Link(target) => name.clone_from(target),
                        &Member::File { offset, size } => {
                            let file = file.try_clone().map_err(read)?;
                            return Ok(Blob {
                                file,
                                offset,
                                left: size,
                            });
                        }
                    }
                }
                Err(missing())
            }
        }
    }

    /// Reads a whole file of the image, no longer than `limit`.
    pub(super) fn small(&self, name: &str, limit: u64) -> Result<Vec<u8>, SourceError> {
        let mut blob = self.blob(name)?;
        let size = blob.size();
        if size > limit {
            let name = name.to_owned();
            return Err(SourceError::TooLong { name, size, limit });
        }
        let mut bytes = Vec::with_capacity(size as usize);
        blob.read_to_end(&mut bytes)
            .map_err(|source| SourceError::Read {
                name: name.to_owned(),
                source,
            })?;
        Ok(bytes)
    }

    /// Whether the image has a file of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.blob(name).is_ok()
    }
}

/// Where each member of the archive begins; `None` if there are too many.
fn index(file: &File) -> Result<Option<HashMap<String, Member>>, TarError> {
    let whole = Blob {
        file: file
            .try_clone()
            .map_err(|source| TarError::Read { at: 0, source })?,
        offset: 0,
        left: u64::MAX,
    };
    let mut archive = TarReader::new(std::io::BufReader::with_capacity(64 << 10, whole));
    let mut members = HashMap::new();
    while let Some(entry) = archive.next_entry()? {
        if members.len() == MAX_MEMBERS {
            return Ok(None);
        }
        let Some(name) = lexical(&[], &entry.path) else {
            continue;
        };
        let member = match entry.kind {
            Kind::File => Member::File {
                offset: archive.position(),
                size: entry.size,
            },
            Kind::Symlink => {
                let folder: Vec<&str> = name.split('/').collect();
                let (_, folder) = folder.split_last().unwrap_or((&"", &[]));
                match lexical(folder, &entry.link) {
                    Some(target) => Member::Link(target),
                    None => continue,
                }
            }
            Kind::HardLink => match lexical(&[], &entry.link) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            Kind::Directory | Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => continue,
        };
        members.insert(name, member);
    }
    Ok(Some(members))
}

/// The path in its plain form (`./a//b` is `a/b`), seen from `folder`; `None` if it leaves the archive.
fn lexical(folder: &[&str], path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let mut parts = folder.to_vec();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}
