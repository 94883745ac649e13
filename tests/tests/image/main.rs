//! Images made by other tools become block devices. Needs root, mkfs.erofs (erofs-utils), umoci and skopeo.

mod filling;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use migrator::image::{Digest, HandoverError, ImageStore, ImportError, Incoming};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

/// Extended attributes: no safe wrapper is among the dependencies.
mod sys {
    use std::ffi::CString;
    use std::io;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let name = CString::new(name)?;
        // SAFETY: both strings end in NUL, and the kernel reads `value.len()` bytes from `value`, which is that
        // long; it keeps none of the pointers.
        let result = unsafe {
            libc::lsetxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    pub(crate) fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let name = CString::new(name)?;
        let mut value = vec![0u8; 256];
        // SAFETY: both strings end in NUL, and the kernel writes at most `value.len()` bytes to `value`, which is
        // that long; it keeps none of the pointers.
        let length = unsafe {
            libc::lgetxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        value.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
        Ok(value)
    }
}

/// security.capability with cap_net_raw=ep (linux/capability.h, VFS_CAP_REVISION_2). Its flags hold a byte that
/// would end a line, were the value text.
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// A mount that ends with its guard.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Result<Self> {
        let options = format!("size={size}");
        mount(
            Some("none"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .context("mount a tmpfs: this test needs root")?;
        Ok(Self(at.to_owned()))
    }

    /// Mounts an image through a loop device; `None` if this kernel has no EROFS.
    fn erofs(image: &Path, at: &Path) -> Result<Option<Self>> {
        let known = fs::read_to_string("/proc/filesystems")?;
        if !known.split_whitespace().any(|word| word == "erofs") {
            let probe = mount(
                Some("none"),
                at,
                Some("erofs"),
                MsFlags::empty(),
                None::<&str>,
            );
            if probe == Err(nix::errno::Errno::ENODEV) {
                return Ok(None);
            }
        }
        run(
            "mount",
            [
                OsStr::new("-t"),
                "erofs".as_ref(),
                "-o".as_ref(),
                "loop,ro".as_ref(),
                image.as_ref(),
                at.as_ref(),
            ],
        )?;
        Ok(Some(Self(at.to_owned())))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<()> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| format!("run {program}: is it installed?"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {messages}");
    Ok(())
}

/// An OCI layout `layout:latest` that umoci made from what `fill` puts into a root folder.
fn umoci_image(folder: &Path, fill: impl Fn(&Path) -> Result<()>) -> Result<PathBuf> {
    let layout = folder.join("layout");
    let bundle = folder.join("bundle");
    let image = format!("{}:latest", layout.display());
    run(
        "umoci",
        ["init".as_ref(), "--layout".as_ref(), layout.as_os_str()],
    )?;
    run("umoci", ["new", "--image", &image])?;
    run(
        "umoci",
        [
            "unpack".as_ref(),
            "--image".as_ref(),
            OsStr::new(&image),
            bundle.as_os_str(),
        ],
    )?;
    fill(&bundle.join("rootfs"))?;
    run(
        "umoci",
        [
            "repack".as_ref(),
            "--image".as_ref(),
            OsStr::new(&image),
            bundle.as_os_str(),
        ],
    )?;
    run(
        "umoci",
        [
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/bin/tool",
            "--config.user",
            "app",
        ],
    )?;
    Ok(layout)
}

fn fill(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("etc"))?;
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\napp:x:77:78::/:/bin/sh\n",
    )?;
    let tool = root.join("bin/tool");
    fs::write(&tool, vec![7; 700_000])?;
    std::os::unix::fs::chown(&tool, Some(70_000), Some(78))?;
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o4755))?;
    sys::set_xattr(&tool, "security.capability", &CAPABILITY)?;
    sys::set_xattr(&tool, "user.note", b"a\nb")?;
    fs::hard_link(&tool, root.join("bin/twin"))?;
    std::os::unix::fs::symlink("/bin/tool", root.join("link"))?;
    mknod(
        &root.join("null"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )?;
    mknod(
        &root.join("pipe"),
        SFlag::S_IFIFO,
        Mode::from_bits_truncate(0o600),
        0,
    )?;
    Ok(())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[test]
fn an_image_of_umoci_keeps_everything_in_its_block_device() -> Result<()> {
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), fill)?;
    let store = ImageStore::open(&folder.path().join("images"))?;
    let record = store.import(&layout, Some("app:1"))?;
    assert_eq!(record.config.cmd, ["/bin/tool"]);
    assert_eq!((record.config.uid, record.config.gid), (77, 78));

    let at = folder.path().join("mounted");
    fs::create_dir(&at)?;
    let image = folder.path().join("image.erofs");
    store.copy_out(&record.erofs_digest, &image)?;
    let Some(_mount) = Mount::erofs(&image, &at)? else {
        eprintln!("skipped in part: this kernel has no EROFS");
        return Ok(());
    };
    let tool = at.join("bin/tool");
    let meta = tool.metadata()?;
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (70_000, 78, 0o4755)
    );
    assert_eq!(meta.nlink(), 2);
    assert_eq!(meta.ino(), at.join("bin/twin").metadata()?.ino());
    assert_eq!(fs::read(&tool)?, vec![7; 700_000]);
    assert_eq!(sys::get_xattr(&tool, "security.capability")?, CAPABILITY);
    assert_eq!(sys::get_xattr(&tool, "user.note")?, b"a\nb");
    assert_eq!(fs::read_link(at.join("link"))?, Path::new("/bin/tool"));
    let null = at.join("null").metadata()?;
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), makedev(1, 3));
    assert!(at.join("pipe").metadata()?.file_type().is_fifo());
    // Kept to the second, in which umoci writes it.
    let original = folder
        .path()
        .join("bundle/rootfs/bin/tool")
        .metadata()?
        .mtime();
    assert!((meta.mtime() - original).abs() <= 1);
    Ok(())
}

#[test]
fn every_format_of_skopeo_gives_the_same_bytes() -> Result<()> {
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), fill)?;
    let source = format!("oci:{}:latest", layout.display());
    let mut digests = Vec::new();
    for (kind, file) in [
        ("oci-archive", "o.tar"),
        ("docker-archive", "d.tar"),
        ("oci", "copy"),
    ] {
        let path = folder.path().join(file);
        let target = format!("{kind}:{}:app:2", path.display());
        run("skopeo", ["copy", "--quiet", &source, &target])?;
        // Each into a store of its own, so that each is built.
        let store = ImageStore::open(&folder.path().join(format!("images-{file}")))?;
        let record = store.import(&path, None)?;
        assert_eq!(record.name, "app:2");
        digests.push(record.erofs_digest);
    }
    let store = ImageStore::open(&folder.path().join("images"))?;
    let record = store.import(&layout, None)?;
    assert_eq!(record.name, "layout:latest");
    assert!(
        digests.iter().all(|digest| *digest == record.erofs_digest),
        "{digests:?}"
    );
    Ok(())
}

#[test]
fn importing_again_only_adds_the_name() -> Result<()> {
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), fill)?;
    let store = ImageStore::open(&folder.path().join("images"))?;
    let first = store.import(&layout, Some("a"))?;
    let second = store.import(&layout, Some("b"))?;
    assert_eq!(first.erofs_digest, second.erofs_digest);
    let listed: Vec<String> = store.list().into_iter().map(|record| record.name).collect();
    assert_eq!(listed, ["a:latest", "b:latest"]);
    Ok(())
}

#[test]
fn two_imports_at_once_are_safe() -> Result<()> {
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), fill)?;
    let store = ImageStore::open(&folder.path().join("images"))?;
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = ["a", "b", "c"]
            .map(|name| {
                let (store, layout) = (&store, &layout);
                scope.spawn(move || store.import(layout, Some(name)))
            })
            .into_iter()
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join())
            .collect::<Vec<_>>()
    });
    for result in results {
        result.expect("no panic")?;
    }
    assert_eq!(store.list().len(), 3);
    assert_eq!(
        names(&folder.path().join("images"))?.len(),
        5,
        "one image, the chunks, the content, the lock, the names"
    );
    Ok(())
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing() -> Result<()> {
    let folder = TempDir::new()?;
    let small = folder.path().join("small");
    fs::create_dir(&small)?;
    let _disk = Mount::tmpfs(&small, "12m")?;
    let store = Arc::new(ImageStore::open(&small.join("images"))?);
    // The first does not fit unpacked; the second does, but its block device has no room beside it.
    for megabytes in [20, 8] {
        let work = TempDir::new()?;
        let layout = umoci_image(work.path(), |root| {
            fill(root)?;
            Ok(fs::write(root.join("large"), vec![1; megabytes << 20])?)
        })?;
        let error = store.import(&layout, None).expect_err("there is no room");
        assert!(matches!(error, ImportError::DiskFull { .. }), "{error:?}");
        assert!(error.to_string().contains("is full"), "{error}");
        assert_eq!(names(&small.join("images"))?, ["chunks", "content", "lock"]);
    }
    let work = TempDir::new()?;
    let layout = umoci_image(work.path(), fill)?;
    let record = store.import(&layout, Some("app"))?;
    store.remove("app", &[])?;
    assert_eq!(
        names(&small.join("images"))?,
        ["chunks", "content", "lock", "names.json"]
    );

    // The same for an image that another node hands over: refused before the first chunk.
    let mut large = record;
    large.erofs_size = 64 << 20;
    large.chunks = (0..=255).map(|n| Digest::of(&[n])).collect();
    large.erofs_digest =
        migrator::image::ImageRecord::digest_of(large.erofs_size, large.chunk_size, &large.chunks);
    let error = Incoming::begin(&store, large).expect_err("there is no room");
    assert!(matches!(error, HandoverError::DiskFull { .. }), "{error:?}");
    assert_eq!(
        names(&small.join("images"))?,
        ["chunks", "content", "lock", "names.json"]
    );
    Ok(())
}

#[test]
fn a_handover_moves_an_image_chunk_by_chunk() -> Result<()> {
    let folder = TempDir::new()?;
    let layout = umoci_image(folder.path(), fill)?;
    let source = ImageStore::open(&folder.path().join("a"))?;
    let destination = Arc::new(ImageStore::open(&folder.path().join("b"))?);
    let record = source.import(&layout, Some("app:1"))?;
    let (incoming, missing) = Incoming::begin(&destination, record.clone())?;
    for index in missing {
        incoming.place(index, &source.read_chunk(&record.erofs_digest, index)?)?;
    }
    incoming.finish()?;
    let [a, b] = ["a.erofs", "b.erofs"].map(|name| folder.path().join(name));
    source.copy_out(&record.erofs_digest, &a)?;
    destination.copy_out(&record.erofs_digest, &b)?;
    assert_eq!(fs::read(a)?, fs::read(b)?);
    // The image's own import on the destination finds it, and does not build it again.
    assert_eq!(
        destination.import(&layout, None)?.erofs_digest,
        record.erofs_digest
    );
    Ok(())
}
