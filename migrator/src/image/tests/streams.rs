use super::{BUDGET, LayerTar, Tree, gzip};
use crate::image::digest::Digest;
use crate::image::layer::{self, Budget, LayerError};
use crate::image::tar::TarError;

#[test]
fn a_wrong_diff_id_is_found() {
    let mut tree = Tree::new();
    let layer = LayerTar::new().file("a", "1").bytes();
    let mut budget = BUDGET;
    let result = layer::apply(
        &layer[..],
        Digest::of(b"other"),
        &mut tree.rootfs,
        &mut budget,
    );
    assert!(matches!(result, Err(LayerError::DiffId { .. })));
    // Bytes behind the archive's end count too.
    let mut longer = layer.clone();
    longer.extend_from_slice(b"more");
    let result = layer::apply(
        &longer[..],
        Digest::of(&layer),
        &mut tree.rootfs,
        &mut budget,
    );
    assert!(matches!(result, Err(LayerError::DiffId { .. })));
}

#[test]
fn gzip_and_zstd_layers_are_read() {
    let layer = LayerTar::new().file("a", &"1".repeat(100_000)).bytes();
    let id = Digest::of(&layer);
    for packed in [gzip(&layer), zstd::encode_all(&layer[..], 1).unwrap()] {
        let mut tree = Tree::new();
        layer::apply(&packed[..], id, &mut tree.rootfs, &mut BUDGET.clone()).unwrap();
        assert_eq!(tree.text("a").len(), 100_000);
        // Cut short, it is an error, not an end.
        let cut = &packed[..packed.len() / 2];
        let result = layer::apply(cut, id, &mut Tree::new().rootfs, &mut BUDGET.clone());
        assert!(result.is_err());
    }
    let error = Tree::new().apply_bytes(b"BZh91AY").unwrap_err();
    assert!(matches!(error, LayerError::Compression(ref e) if e.to_string().contains("bzip2")));
}

#[test]
fn a_cut_layer_is_an_error() {
    let layer = LayerTar::new().file("a", &"1".repeat(5000)).bytes();
    for length in [100, 512, 600, 3000, 5632] {
        let result = Tree::new().apply_bytes(&layer[..length]);
        match result {
            Err(LayerError::Tar(TarError::Truncated { .. })) | Err(LayerError::Entry(_)) => {}
            // Padding and the end's zeroes missing: what is there is whole.
            Ok(()) => assert!(length >= 5632, "{length}"),
            other => panic!("{length}: {other:?}"),
        }
    }
}

#[test]
fn bombs_are_stopped_by_the_budget() {
    let mut tree = Tree::new();
    let layer = LayerTar::new().file("a", &"0".repeat(1 << 20)).bytes();
    let packed = gzip(&layer);
    let mut small = Budget {
        entries: 10,
        bytes: 100_000,
    };
    let result = layer::apply(
        &packed[..],
        Digest::of(&layer),
        &mut tree.rootfs,
        &mut small,
    );
    assert!(matches!(result, Err(LayerError::TooLarge)));
    // Zeroes behind the end of the archive.
    let mut long = LayerTar::new().file("b", "1").bytes();
    long.resize(long.len() + (4 << 20), 0);
    let packed = gzip(&long);
    let mut small = Budget {
        entries: 10,
        bytes: 100_000,
    };
    let result = layer::apply(&packed[..], Digest::of(&long), &mut tree.rootfs, &mut small);
    assert!(result.unwrap_err().to_string().contains("cannot be read"));
    let many = (0..20)
        .fold(LayerTar::new(), |layer, i| layer.dir(&format!("d{i}/")))
        .bytes();
    let result = layer::apply(&many[..], Digest::of(&many), &mut tree.rootfs, &mut small);
    assert!(matches!(result, Err(LayerError::TooManyEntries)));
}

#[test]
fn extension_headers_are_bounded_and_checked() {
    let giant = {
        let mut header = ::tar::Header::new_gnu();
        header.set_entry_type(::tar::EntryType::GNULongName);
        header.set_size(60 << 30);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let damaged = |bytes: &[u8]| match Tree::new().apply_bytes(bytes) {
        Err(LayerError::Tar(TarError::Damaged { what, .. })) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(damaged(&giant), "name too long");
    for records in [
        &b"9 a=b\n"[..],
        b"x a=b\n",
        b"6 ab\n",
        b"99999999999 a=b\n",
        b"3 \n",
        b"0 ",
    ] {
        let layer = LayerTar::new()
            .extension(b'x', records)
            .file("a", "1")
            .bytes();
        assert_eq!(damaged(&layer), "bad PAX record", "{records:?}");
    }
    let layer = LayerTar::new()
        .pax(&[("GNU.sparse.major", b"1")])
        .file("a", "1");
    let error = Tree::new().apply(layer).unwrap_err();
    assert!(error.to_string().contains("sparse"), "{error}");
    assert_eq!(damaged(&[7; 1024]), "this is not a tar header");
}

proptest::proptest! {
    #[test]
    fn junk_never_panics(at in 0_usize..4096, junk in proptest::collection::vec(proptest::num::u8::ANY, 1..64)) {
        let mut layer = LayerTar::new()
            .dir("d/")
            .pax(&[("path", b"d/x"), ("SCHILY.xattr.user.a", b"1")])
            .file("f", "content")
            .symlink("l", "d")
            .hard_link("h", "d/x")
            .bytes();
        let at = at.min(layer.len() - junk.len());
        layer[at..at + junk.len()].copy_from_slice(&junk);
        let _ = Tree::new().apply_bytes(&layer);
    }
}
