//! A directory tree that hostile archives are unpacked into.
//!
//! Every path is resolved by the kernel with the tree's root as its `/` (openat2, RESOLVE_IN_ROOT): a
//! symlink that a layer made, absolute or with `..`, leads somewhere inside the tree, as it will in the
//! container. The last component is never followed. Nothing is ever opened by a path of the host.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::attributes::{Failed, failed, file_type, set_time};
use super::path::{BadPath, Split, display, split};
use super::tar::{Entry, Kind};

/// Deepest directory, counted from the root of the tree. Real images stay below 64; whoever walks the
/// tree (mkfs.erofs, the removal) holds one descriptor a level.
const MAX_DEPTH: usize = 256;

/// Buffer for file contents, in bytes.
const BUFFER: usize = 256 << 10;

/// How often a lookup is tried again that raced with a rename elsewhere on the machine (openat2(2), EAGAIN).
const LOOKUP_TRIES: u32 = 100;

/// Why an entry is not unpacked. Every message names the entry.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The path, or the target of a hard link, is not one that an honest layer has.
    #[error("entry `{path}` is refused: {why}")]
    Hostile {
        /// The entry.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel said no.
    #[error("entry `{path}`: cannot {what}")]
    Io {
        /// The entry.
        path: String,
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The content of a file could not be read from the layer.
    #[error("entry `{path}`: cannot read its content from the layer")]
    Content {
        /// The entry.
        path: String,
        /// The error.
        source: io::Error,
    },
}

/// The directory that an entry goes to.
pub(super) struct Parent {
    pub(super) fd: OwnedFd,
    pub(super) inode: u64,
    /// Where it really is, relative to the root: symlinks resolved.
    pub(super) place: PathBuf,
}

/// A tree under construction.
pub(super) struct Rootfs {
    root: OwnedFd,
    root_place: PathBuf,
    /// The last parent, and the path it was asked for by: neighbours in an archive mostly share it.
    last_parent: Option<(PathBuf, Rc<Parent>)>,
    /// What the layer at hand has made, by inode of the directory and name: a whiteout hides only what the layers
    /// below it made (OCI image-spec, layer.md, "Whiteouts").
    made: HashSet<(u64, OsString)>,
    /// Modification times of directories, set when nothing more changes in them.
    pub(super) directory_times: HashMap<PathBuf, (i64, u32)>,
    newest: i64,
    pub(super) buffer: Vec<u8>,
}

impl Rootfs {
    /// Makes the directory `root`, empty, owned by root, mode 0755.
    pub(super) fn create(root: &Path) -> io::Result<Self> {
        std::fs::create_dir(root)?;
        let root_place = root.canonicalize()?;
        let root = OwnedFd::from(File::open(root)?);
        fchmod(&root, Mode::from_bits_truncate(0o755))?;
        Ok(Self {
            root,
            root_place,
            last_parent: None,
            made: HashSet::new(),
            directory_times: HashMap::from([(PathBuf::new(), (0, 0))]),
            newest: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Tells that the entries that follow belong to the next layer.
    pub(super) fn begin_layer(&mut self) {
        self.made.clear();
    }

    /// Applies one entry; the content of a file is read from `content`.
    pub(super) fn apply(
        &mut self,
        entry: &Entry,
        content: &mut impl Read,
    ) -> Result<(), RootfsError> {
        self.newest = self.newest.max(entry.mtime.0);
        let hostile = |why: BadPath| RootfsError::Hostile {
            path: entry.shown(),
            why: why.0,
        };
        let Split { parent, name } = split(&entry.path).map_err(hostile)?;
        let Some(name) = name else {
            return self.root_entry(entry).map_err(|error| error.of(entry));
        };
        let parent = self
            .parent(&parent, true)
            .map_err(|error| error.of(entry))?;
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self.whiteout(entry, &parent, hidden);
        }
        self.made.insert((parent.inode, name.clone()));
        match entry.kind {
            Kind::Directory => self
                .directory(entry, &parent, &name)
                .map_err(|e| e.of(entry)),
            Kind::File => self.file(entry, &parent, &name, content),
            Kind::HardLink => self.hard_link(entry, &parent, &name),
            Kind::Symlink | Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.node(entry, &parent, &name).map_err(|e| e.of(entry))
            }
        }
    }

    /// Sets the directories' times. Returns the newest modification time of all entries, in seconds since
    /// 1970.
    pub(super) fn finish(mut self) -> Result<i64, RootfsError> {
        self.last_parent = None;
        for (place, &time) in &self.directory_times {
            let path = if place.as_os_str().is_empty() {
                Path::new(".")
            } else {
                place
            };
            // Gone or replaced by something else since.
            let Ok(fd) = self.lookup(path, OFlag::O_DIRECTORY, ResolveFlag::RESOLVE_NO_SYMLINKS)
            else {
                continue;
            };
            set_time(&fd, time).map_err(|Failed(what, source)| RootfsError::Io {
                path: display(place.as_os_str()),
                what,
                source,
            })?;
        }
        Ok(self.newest)
    }

    /// Reads a small file of the tree, symlinks resolved inside it; `None` if there is none.
    pub(super) fn read_small(&self, path: &str, max: u64) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let fd = match self.lookup(Path::new(path), flags, ResolveFlag::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let file = File::from(fd);
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        file.take(max).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Opens `path` with the tree's root as its `/`.
    pub(super) fn lookup(
        &self,
        path: &Path,
        flags: OFlag,
        resolve: ResolveFlag,
    ) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(resolve | ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        for _ in 0..LOOKUP_TRIES {
            match openat2(&self.root, path, how) {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// The directory `path`; made, with what leads to it, if `make` says so.
    pub(super) fn parent(&mut self, path: &Path, make: bool) -> Result<Rc<Parent>, Failed> {
        if let Some((known, parent)) = &self.last_parent
            && known == path
        {
            return Ok(parent.clone());
        }
        let asked = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let fd = match self.lookup(asked, OFlag::O_DIRECTORY, ResolveFlag::empty()) {
            Err(Errno::ENOENT) if make => self.make_path(path)?,
            result => result.map_err(failed("open its directory"))?,
        };
        let parent = Rc::new(self.describe(fd)?);
        self.last_parent = Some((path.to_owned(), parent.clone()));
        Ok(parent)
    }

    fn describe(&self, fd: OwnedFd) -> Result<Parent, Failed> {
        let inode = fstat(&fd).map_err(failed("look at its directory"))?.st_ino;
        let place = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| Failed("find its directory", error))?;
        let outside = || Failed("open its directory", Errno::EXDEV.into());
        let place = place
            .strip_prefix(&self.root_place)
            .map_err(|_| outside())?
            .to_owned();
        if place.components().count() >= MAX_DEPTH {
            return Err(Failed(
                "go deeper than 256 directories",
                Errno::ENAMETOOLONG.into(),
            ));
        }
        Ok(Parent { fd, inode, place })
    }

    /// Makes the directories of `path` that are missing, owned by root, mode 0755: layers need not list
    /// them.
    fn make_path(&mut self, path: &Path) -> Result<OwnedFd, Failed> {
        let mut at = self.lookup(Path::new("."), OFlag::O_DIRECTORY, ResolveFlag::empty());
        let mut prefix = PathBuf::new();
        for component in path {
            let parent = self.describe(at.map_err(failed("open its directory"))?)?;
            prefix.push(component);
            at = self.lookup(&prefix, OFlag::O_DIRECTORY, ResolveFlag::empty());
            if matches!(at, Err(Errno::ENOENT)) {
                // A symlink that leads nowhere is in the way: EEXIST.
                mkdirat(&parent.fd, component, Mode::from_bits_truncate(0o700))
                    .map_err(failed("make its directory"))?;
                at = self.lookup(&prefix, OFlag::O_DIRECTORY, ResolveFlag::empty());
                if let Ok(fd) = &at {
                    fchmod(fd, Mode::from_bits_truncate(0o755)).map_err(failed("set a mode"))?;
                }
                self.directory_times
                    .insert(parent.place.join(component), (0, 0));
            }
        }
        at.map_err(failed("open its directory"))
    }

    fn whiteout(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        hidden: &[u8],
    ) -> Result<(), RootfsError> {
        match hidden {
            b"" | b"." | b".." => {
                return Err(RootfsError::Hostile {
                    path: entry.shown(),
                    why: "a whiteout must name a file",
                });
            }
            b".wh..opq" => self.clear(&parent.fd, true),
            // The other names of this form are aufs's own bookkeeping.
            _ if hidden.starts_with(b".wh.") => return Ok(()),
            _ => self
                .remove(parent, OsStr::from_bytes(hidden), true)
                .map(drop),
        }
        .map_err(|error| Failed("remove what the whiteout hides", error).of(entry))
    }

    /// Makes way for an entry of the same name.
    pub(super) fn replace(&mut self, parent: &Parent, name: &OsStr) -> Result<(), Failed> {
        self.remove(parent, name, false)
            .map(drop)
            .map_err(|error| Failed("replace what is there", error))
    }

    /// Removes `name` and all below it; with `keep_made`, not what the layer at hand made. Returns whether
    /// anything was kept.
    fn remove(&mut self, parent: &Parent, name: &OsStr, keep_made: bool) -> io::Result<bool> {
        // Any path may lead elsewhere from here on.
        self.last_parent = None;
        self.remove_at(&parent.fd, parent.inode, name, keep_made)
    }

    fn remove_at(
        &self,
        dir: &OwnedFd,
        inode: u64,
        name: &OsStr,
        keep_made: bool,
    ) -> io::Result<bool> {
        let there = match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(false),
            result => result?,
        };
        let keep = keep_made && self.made.contains(&(inode, name.to_owned()));
        if file_type(&there) != SFlag::S_IFDIR {
            if !keep {
                unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?;
            }
            return Ok(keep);
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let child = openat(dir, name, flags, Mode::empty())?;
        if self.clear_children(&child, keep_made)? || keep {
            return Ok(true);
        }
        unlinkat(dir, name, UnlinkatFlags::RemoveDir)?;
        Ok(false)
    }

    fn clear(&mut self, dir: &OwnedFd, keep_made: bool) -> io::Result<()> {
        self.last_parent = None;
        self.clear_children(dir, keep_made).map(drop)
    }

    /// Removes what is in `dir`. Returns whether anything was kept.
    fn clear_children(&self, dir: &OwnedFd, keep_made: bool) -> io::Result<bool> {
        let inode = fstat(dir)?.st_ino;
        let mut kept = false;
        let children: Vec<OsString> =
            std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))?
                .map(|child| child.map(|child| child.file_name()))
                .collect::<io::Result<_>>()?;
        for name in children {
            kept |= self.remove_at(dir, inode, &name, keep_made)?;
        }
        Ok(kept)
    }
}
