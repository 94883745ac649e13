//! What each kind of archive entry makes in the tree.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, ResolveFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags};
use nix::sys::stat::{fchmodat, makedev, mkdirat, utimensat};
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::attributes::{Failed, failed, file_type, lstat, make_node};
use super::attributes::{set_owner_and_mode, set_time, time_spec};
use super::path::split;
use super::rootfs::{Parent, Rootfs, RootfsError};
use super::tar::{Entry, Kind};
use super::xattr::{self, Target};

impl Rootfs {
    pub(super) fn root_entry(&mut self, entry: &Entry) -> Result<(), Failed> {
        if entry.kind != Kind::Directory {
            return Err(Failed("replace the root directory", Errno::EBUSY.into()));
        }
        let fd = self
            .lookup(Path::new("."), OFlag::O_DIRECTORY, ResolveFlag::empty())
            .map_err(failed("open the root directory"))?;
        set_owner_and_mode(&fd, entry)?;
        xattr::set(entry, &Target::Open(fd.as_fd())).map_err(|e| Failed(xattr::WHAT, e))?;
        self.directory_times.insert(PathBuf::new(), entry.mtime);
        Ok(())
    }

    pub(super) fn directory(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        name: &OsStr,
    ) -> Result<(), Failed> {
        let private = Mode::from_bits_truncate(0o700);
        match mkdirat(&parent.fd, name, private) {
            Err(Errno::EEXIST) => {
                let there = lstat(parent, name).map_err(failed("look at what is there"))?;
                if file_type(&there) != SFlag::S_IFDIR {
                    self.replace(parent, name)?;
                    mkdirat(&parent.fd, name, private).map_err(failed("make the directory"))?;
                }
            }
            result => result.map_err(failed("make the directory"))?,
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd =
            openat(&parent.fd, name, flags, Mode::empty()).map_err(failed("open the directory"))?;
        set_owner_and_mode(&fd, entry)?;
        xattr::set(entry, &Target::Open(fd.as_fd())).map_err(|e| Failed(xattr::WHAT, e))?;
        self.directory_times
            .insert(parent.place.join(name), entry.mtime);
        Ok(())
    }

    pub(super) fn file(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        name: &OsStr,
        content: &mut impl Read,
    ) -> Result<(), RootfsError> {
        let flags =
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let make = || openat(&parent.fd, name, flags, Mode::from_bits_truncate(0o600));
        let fd = match make() {
            Err(Errno::EEXIST) => {
                self.replace(parent, name).map_err(|e| e.of(entry))?;
                make()
            }
            result => result,
        };
        let fd = fd
            .map_err(failed("make the file"))
            .map_err(|e| e.of(entry))?;
        let mut file = File::from(fd);
        loop {
            let n = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(RootfsError::Content {
                        path: entry.shown(),
                        source,
                    });
                }
            };
            file.write_all(&self.buffer[..n])
                .map_err(|error| Failed("write the file", error).of(entry))?;
        }
        let fd = OwnedFd::from(file);
        let attributes = || -> Result<(), Failed> {
            set_owner_and_mode(&fd, entry)?;
            // After the owner: chown clears security.capability.
            xattr::set(entry, &Target::Open(fd.as_fd())).map_err(|e| Failed(xattr::WHAT, e))?;
            set_time(&fd, entry.mtime)
        };
        attributes().map_err(|e| e.of(entry))
    }

    pub(super) fn hard_link(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        name: &OsStr,
    ) -> Result<(), RootfsError> {
        let hostile = |why| RootfsError::Hostile {
            path: entry.shown(),
            why,
        };
        let target = split(&entry.link)
            .map_err(|_| hostile("it is a hard link to a path outside of the image"))?;
        let target_name = target
            .name
            .ok_or_else(|| hostile("it is a hard link to the root directory"))?;
        let missing = |_| hostile("it is a hard link to a file that the image does not have");
        let target_parent = self.parent(&target.parent, false).map_err(missing)?;
        let there = lstat(&target_parent, &target_name)
            .map_err(|errno| missing(Failed("", errno.into())))?;
        if file_type(&there) == SFlag::S_IFDIR {
            return Err(hostile("it is a hard link to a directory"));
        }
        if target_parent.inode == parent.inode && target_name == name {
            return Ok(());
        }
        let link = || {
            let flags = AtFlags::empty();
            linkat(
                &target_parent.fd,
                target_name.as_os_str(),
                &parent.fd,
                name,
                flags,
            )
        };
        let made = match link() {
            Err(Errno::EEXIST) => {
                self.replace(parent, name).map_err(|e| e.of(entry))?;
                link()
            }
            result => result,
        };
        made.map_err(failed("make the hard link"))
            .map_err(|e| e.of(entry))
    }

    /// Symlinks, devices and FIFOs.
    pub(super) fn node(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        name: &OsStr,
    ) -> Result<(), Failed> {
        let make = || match entry.kind {
            Kind::Symlink => symlinkat(OsStr::from_bytes(&entry.link), &parent.fd, name),
            Kind::Fifo => make_node(parent, name, SFlag::S_IFIFO, 0),
            Kind::CharDevice | Kind::BlockDevice => {
                let (major, minor) = entry.device;
                let kind = if entry.kind == Kind::CharDevice {
                    SFlag::S_IFCHR
                } else {
                    SFlag::S_IFBLK
                };
                make_node(
                    parent,
                    name,
                    kind,
                    makedev(u64::from(major), u64::from(minor)),
                )
            }
            Kind::File | Kind::Directory | Kind::HardLink => Err(Errno::EINVAL),
        };
        match make() {
            Err(Errno::EEXIST) => {
                self.replace(parent, name)?;
                make()
            }
            result => result,
        }
        .map_err(failed(match entry.kind {
            Kind::Symlink => "make the symlink",
            _ => "make the device or FIFO",
        }))?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fchownat(
            &parent.fd,
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(failed("set the owner"))?;
        if entry.kind != Kind::Symlink {
            let mode = Mode::from_bits_truncate(entry.mode);
            fchmodat(&parent.fd, name, mode, FchmodatFlags::FollowSymlink)
                .map_err(failed("set the mode"))?;
        }
        xattr::set(entry, &Target::At(parent.fd.as_fd(), name))
            .map_err(|e| Failed(xattr::WHAT, e))?;
        let time = time_spec(entry.mtime);
        utimensat(
            &parent.fd,
            name,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(failed("set the time"))
    }
}
