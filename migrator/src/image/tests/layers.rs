use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::{LayerTar, Tree, tree};
use crate::image::layer::LayerError;
use crate::image::rootfs::RootfsError;

fn refusal(layer: LayerTar) -> String {
    let mut tree = Tree::new();
    match tree.apply(layer).unwrap_err() {
        LayerError::Entry(error @ RootfsError::Hostile { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn contents_modes_and_times_are_kept() {
    let tree = tree([LayerTar::new()
        .dir("bin/")
        .file_mode("bin/su", 0o4755)
        .symlink("bin/sh", "busybox")
        .fifo("pipe")
        .file("etc/deep/er/file", "x")]);
    let root = tree.path("");
    let folder = tree.finish();
    let meta = |path: &str| root.join(path).symlink_metadata().unwrap();
    assert_eq!(meta("bin/su").permissions().mode() & 0o7777, 0o4755);
    assert_eq!(meta("bin/su").mtime(), 1_000_000);
    assert_eq!(meta("bin").mtime(), 1_000_000);
    assert_eq!(meta("bin/sh").mtime(), 1_000_000);
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!(
        fs::read_link(root.join("bin/sh")).unwrap(),
        Path::new("busybox")
    );
    // Directories that no layer lists.
    assert_eq!(meta("etc/deep").permissions().mode() & 0o7777, 0o755);
    assert_eq!(meta("etc/deep").mtime(), 0);
    assert_eq!(meta("").mtime(), 0);
    drop(folder);
}

#[test]
fn a_whiteout_hides_files_and_directories_of_lower_layers() {
    let tree = tree([
        LayerTar::new()
            .file("a", "1")
            .file("d/x", "1")
            .file("d/sub/y", "1"),
        LayerTar::new()
            .file(".wh.a", "")
            .file(".wh.d", "")
            .file("b", "2"),
    ]);
    assert!(!tree.has("a") && !tree.has("d") && tree.has("b"));
    assert!(!tree.has(".wh.a"));
}

#[test]
fn a_whiteout_does_not_hide_its_own_layer() {
    for first in [true, false] {
        let lower = LayerTar::new().file("d/old", "1").file("d/sub/old", "1");
        let upper = LayerTar::new();
        let upper = if first {
            upper.file(".wh.d", "")
        } else {
            upper
        };
        let upper = upper.file("d/sub/new", "2");
        let upper = if first {
            upper
        } else {
            upper.file(".wh.d", "")
        };
        let tree = tree([lower, upper]);
        assert_eq!(tree.text("d/sub/new"), "2");
        assert!(!tree.has("d/old") && !tree.has("d/sub/old"), "{first}");
    }
}

#[test]
fn an_opaque_directory_keeps_only_its_own_layer() {
    for first in [true, false] {
        let lower = LayerTar::new()
            .file("d/old", "1")
            .file("d/sub/old", "1")
            .file("e", "1");
        let upper = LayerTar::new().dir("d/");
        let upper = if first {
            upper.file("d/.wh..wh..opq", "")
        } else {
            upper
        };
        let upper = upper.file("d/new", "2").file("d/sub/new", "2");
        let upper = if first {
            upper
        } else {
            upper.file("d/.wh..wh..opq", "")
        };
        let tree = tree([lower, upper]);
        assert!(tree.has("d/new") && tree.has("d/sub/new") && tree.has("e"));
        assert!(!tree.has("d/old") && !tree.has("d/sub/old"), "{first}");
    }
}

#[test]
fn a_whiteout_of_nothing_is_harmless_and_of_a_parent_is_refused() {
    let tree = tree([LayerTar::new()
        .file(".wh.none", "")
        .file("x/.wh..wh.plnk", "")]);
    assert!(tree.has("x"));
    for path in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
        let message = refusal(LayerTar::new().file("d/f", "1").file(path, ""));
        assert!(
            message.contains(path) && message.contains("whiteout"),
            "{message}"
        );
    }
}

#[test]
fn an_upper_layer_replaces_what_is_in_the_way() {
    let tree = tree([
        LayerTar::new()
            .file("a", "1")
            .file("d/x", "1")
            .symlink("l", "a")
            .hard_link("h", "a"),
        LayerTar::new()
            .dir("a/")
            .file("a/in", "2")
            .file("d", "2")
            .file("l", "2"),
    ]);
    assert_eq!(tree.text("a/in"), "2");
    assert_eq!(tree.text("d"), "2");
    // The link is replaced, not written through; the other name of a file keeps its content.
    assert_eq!(tree.text("l"), "2");
    assert_eq!(tree.text("h"), "1");
}

#[test]
fn hard_links_reach_lower_layers() {
    let tree = tree([
        LayerTar::new().file("usr/a", "1"),
        LayerTar::new()
            .hard_link("b", "usr/a")
            .hard_link("c", "./usr/a"),
    ]);
    let inode = |path: &str| tree.path(path).metadata().unwrap().ino();
    assert_eq!(inode("usr/a"), inode("b"));
    assert_eq!(inode("usr/a"), inode("c"));
}

#[test]
fn symlinks_stay_inside_the_image() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let target = outside.path().to_str().unwrap();
    let up = format!("{}{target}", "../".repeat(12));
    for link in [target, &up] {
        // As long as the target is missing inside the image, there is no way through it.
        let layer = LayerTar::new()
            .symlink("a", link)
            .file("a/victim", "hacked");
        assert!(Tree::new().apply(layer).is_err());
        // With it, the entry lands inside.
        let mut tree = Tree::new();
        let inside = &target[1..];
        let layer = LayerTar::new()
            .dir(inside)
            .symlink("a", link)
            .file("a/victim", "inside");
        tree.apply(layer).unwrap();
        assert_eq!(tree.text(&format!("{inside}/victim")), "inside");
        // A whiteout goes the same way.
        tree.apply(
            LayerTar::new()
                .file("a/.wh.victim", "")
                .file("a/.wh..wh..opq", ""),
        )
        .unwrap();
        assert!(!tree.has(&format!("{inside}/victim")));
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    // A link as the last component is replaced, never followed.
    let layer = LayerTar::new()
        .symlink("v", victim.to_str().unwrap())
        .file("v", "hacked");
    let tree = tree([layer]);
    assert_eq!(tree.text("v"), "hacked");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
}

#[test]
fn a_merged_usr_works_across_layers() {
    let tree = tree([
        LayerTar::new().dir("usr/bin/").symlink("bin", "usr/bin"),
        LayerTar::new().file("bin/tool", "1").file("bin/other", "1"),
        LayerTar::new().file("bin/.wh.other", ""),
    ]);
    assert_eq!(tree.text("usr/bin/tool"), "1");
    assert!(!tree.has("usr/bin/other"));
    assert_eq!(
        fs::read_link(tree.path("bin")).unwrap(),
        Path::new("usr/bin")
    );
}

#[test]
fn hostile_paths_are_refused_by_name() {
    for path in ["../evil", "a/../../evil", "/..", ".."] {
        let message = refusal(LayerTar::new().file(path, "x"));
        assert!(
            message.contains(path) && message.contains(".."),
            "{message}"
        );
    }
    let message = refusal(LayerTar::new().hard_link("h", "../../etc/shadow"));
    assert!(
        message.contains("`h`") && message.contains("outside"),
        "{message}"
    );
    // Absolute means: from the image's root.
    let message = refusal(LayerTar::new().hard_link("h", "/etc/passwd"));
    assert!(message.contains("does not have"), "{message}");
    let message = refusal(LayerTar::new().dir("d/").hard_link("h", "d"));
    assert!(message.contains("directory"), "{message}");
    let tree = tree([LayerTar::new().file("/abs", "1")]);
    assert!(tree.has("abs"));
}

#[test]
fn a_hard_link_does_not_follow_a_symlink_out() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    let path = outside.path().to_str().unwrap();
    let tree = tree([LayerTar::new().symlink("s", path).hard_link("h", "s")]);
    // The link itself has two names; its target none more.
    assert!(tree.path("h").symlink_metadata().unwrap().is_symlink());
    assert_eq!(outside.path().metadata().unwrap().nlink(), 1);
}

#[test]
fn directories_deeper_than_any_image_are_refused() {
    // By steps: each path is short, as it goes through a link to the deepest directory so far.
    let mut layer = LayerTar::new().dir("d0/");
    let mut tree = Tree::new();
    let mut result = Ok(());
    for step in 0..30 {
        let path = "x/".repeat(20);
        layer = layer.dir(&format!("d{step}/{path}"));
        layer = layer.symlink(&format!("d{}", step + 1), &format!("d{step}/{path}"));
        result = tree.apply(std::mem::replace(&mut layer, LayerTar::new()));
        if result.is_err() {
            break;
        }
    }
    let error = format!("{:?}", result.unwrap_err());
    assert!(
        error.contains("256") || error.contains("FilesystemLoop"),
        "{error}"
    );
    tree.finish();
}

#[test]
fn long_names_and_binary_attributes_come_through() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let gnu = format!("{}\0", long.replace('f', "g"));
    let tree = tree([LayerTar::new()
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"12.5"),
            ("SCHILY.xattr.user.binary", b"a\nb=\0c"),
        ])
        .file("short", "pax")
        .extension(b'L', gnu.as_bytes())
        .file("short", "gnu")]);
    assert_eq!(tree.text(&long), "pax");
    assert_eq!(tree.text(&long.replace('f', "g")), "gnu");
    assert!(!tree.has("short"));
    let meta = tree.path(&long).metadata().unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (12, 500_000_000));
}
