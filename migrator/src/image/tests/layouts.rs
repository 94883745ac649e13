use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{LayerTar, gzip};
use crate::image::digest::Digest;
use crate::image::oci::{self, Chosen, OciError};
use crate::image::source::{Source, SourceError};

/// An OCI layout under construction.
struct Layout {
    folder: tempfile::TempDir,
}

impl Layout {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("image/blobs/sha256")).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(
            self.path().join(format!("blobs/sha256/{}", digest.hex())),
            bytes,
        )
        .unwrap();
        digest
    }

    fn json(&self, kind: &str, value: &Value) -> Value {
        let bytes = serde_json::to_vec(value).unwrap();
        let media_type = format!("application/vnd.oci.image.{kind}.v1+json");
        json!({"mediaType": media_type, "digest": self.blob(&bytes).to_string(), "size": bytes.len()})
    }

    /// Descriptor of the manifest of an image with one layer.
    fn image(&self, architecture: &str, layer: &[u8]) -> Value {
        let packed = gzip(layer);
        let config = self.json(
            "config",
            &json!({
                "os": "linux", "architecture": architecture,
                "config": {"Cmd": ["/bin/x"], "Env": null},
                "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer).to_string()]},
            }),
        );
        let layer = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": self.blob(&packed).to_string(), "size": packed.len(),
        });
        self.json(
            "manifest",
            &json!({"schemaVersion": 2, "config": config, "layers": [layer]}),
        )
    }

    fn index(&self, manifests: &[Value]) {
        fs::write(
            self.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn archive(&self) -> Vec<u8> {
        let mut archive = ::tar::Builder::new(Vec::new());
        archive.append_dir_all(".", self.path()).unwrap();
        archive.into_inner().unwrap()
    }
}

fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

fn platform(mut descriptor: Value, architecture: &str) -> Value {
    descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
    descriptor
}

fn open(path: &Path) -> Source {
    Source::open(path, &std::env::temp_dir(), 1 << 30).unwrap()
}

fn choose(layout: &Layout, wanted: Option<&str>) -> Result<Chosen, OciError> {
    oci::choose(&open(&layout.path()), wanted)
}

#[test]
fn a_folder_and_its_archives_are_the_same_image() {
    let layout = Layout::new();
    let manifest = layout.image("amd64", &LayerTar::new().file("a", "1").bytes());
    layout.index(&[named(manifest.clone(), "web:1")]);
    let archive = layout.archive();
    let mut paths = vec![layout.path()];
    for (name, bytes) in [
        ("i.tar", archive.clone()),
        ("i.tar.gz", gzip(&archive)),
        ("i.tar.zst", zstd::encode_all(&archive[..], 1).unwrap()),
    ] {
        paths.push(layout.folder.path().join(name));
        fs::write(&paths[paths.len() - 1], bytes).unwrap();
    }
    for path in paths {
        let source = open(&path);
        let chosen = oci::choose(&source, None).unwrap();
        assert_eq!(
            chosen.manifest.to_string(),
            manifest["digest"].as_str().unwrap()
        );
        assert_eq!(chosen.name.as_deref(), Some("web:1"));
        assert_eq!(chosen.config.cmd.as_deref().unwrap(), ["/bin/x"]);
        oci::verify(&source, &chosen.layers[0]).unwrap();
    }
}

#[test]
fn the_platform_is_chosen_through_nested_indexes() {
    let layout = Layout::new();
    let tar = LayerTar::new().file("a", "1").bytes();
    let amd64 = layout.image("amd64", &tar);
    let digest = amd64["digest"].as_str().unwrap().to_owned();
    let nested = json!({"schemaVersion": 2, "manifests": [
        platform(layout.image("arm64", &tar), "arm64"),
        platform(amd64, "amd64"),
        platform(json!({"digest": Digest::of(b"none").to_string(), "size": 1}), "unknown"),
    ]});
    layout.index(&[named(layout.json("index", &nested), "web:1")]);
    let chosen = choose(&layout, None).unwrap();
    assert_eq!(chosen.manifest.to_string(), digest);
    assert_eq!(chosen.name.as_deref(), Some("web:1"));
}

#[test]
fn an_image_for_another_machine_is_refused_with_what_there_is() {
    let layout = Layout::new();
    let arm = layout.image("arm64", &LayerTar::new().bytes());
    for descriptor in [platform(arm.clone(), "arm64"), arm] {
        layout.index(&[descriptor]);
        let message = choose(&layout, None).unwrap_err().to_string();
        assert!(message.contains("linux/arm64"), "{message}");
    }
}

#[test]
fn one_of_several_images_is_chosen_by_name() {
    let layout = Layout::new();
    let one = layout.image("amd64", &LayerTar::new().file("a", "1").bytes());
    let two = layout.image("amd64", &LayerTar::new().file("a", "2").bytes());
    layout.index(&[named(one, "web:1"), named(two.clone(), "v2")]);
    let message = choose(&layout, None).unwrap_err().to_string();
    assert!(
        message.contains("web:1, v2") && message.contains("--name"),
        "{message}"
    );
    let chosen = choose(&layout, Some("web:v2")).unwrap();
    assert_eq!(chosen.manifest.to_string(), two["digest"].as_str().unwrap());
    assert!(choose(&layout, Some("other")).is_err());
}

#[test]
fn damaged_blobs_are_found() {
    let layout = Layout::new();
    let manifest = layout.image("amd64", &LayerTar::new().file("a", "1").bytes());
    layout.index(std::slice::from_ref(&manifest));
    let chosen = choose(&layout, None).unwrap();
    let file = layout.path().join(&chosen.layers[0].file);
    let mut bytes = fs::read(&file).unwrap();
    bytes[5] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let error = oci::verify(&open(&layout.path()), &chosen.layers[0]).unwrap_err();
    assert!(matches!(error, OciError::Damaged { .. }), "{error}");
    bytes.pop();
    fs::write(&file, &bytes).unwrap();
    let error = oci::verify(&open(&layout.path()), &chosen.layers[0]).unwrap_err();
    assert!(matches!(error, OciError::Size { .. }), "{error}");
    fs::remove_file(&file).unwrap();
    let error = oci::verify(&open(&layout.path()), &chosen.layers[0]).unwrap_err();
    assert!(
        error.to_string().contains("has no file `blobs/sha256/"),
        "{error}"
    );

    let mut wrong = manifest;
    wrong["size"] = json!(7);
    layout.index(&[wrong]);
    assert!(matches!(choose(&layout, None), Err(OciError::Size { .. })));
}

#[test]
fn hostile_indexes_are_refused() {
    let layout = Layout::new();
    let digest = |text: &str| json!({"digest": text, "size": 1});
    for text in ["sha256:../../../etc/passwd", "sha512:00", "../x", ""] {
        layout.index(&[digest(text)]);
        assert!(
            matches!(choose(&layout, None), Err(OciError::Digest { .. })),
            "{text}"
        );
    }
    let mut nested = layout.json("index", &json!({"manifests": []}));
    for _ in 0..6 {
        nested = layout.json("index", &json!({"manifests": [nested]}));
    }
    layout.index(&[nested]);
    assert!(matches!(choose(&layout, None), Err(OciError::TooDeep)));
    layout.index(&vec![platform(digest("x"), "arm64"); 1001]);
    assert!(matches!(choose(&layout, None), Err(OciError::TooDeep)));
    layout.index(&[]);
    assert!(matches!(choose(&layout, None), Err(OciError::Empty)));
    fs::write(layout.path().join("index.json"), vec![b' '; 5 << 20]).unwrap();
    let error = choose(&layout, None).unwrap_err();
    assert!(matches!(
        error,
        OciError::Source(SourceError::TooLong { .. })
    ));
    fs::write(layout.path().join("index.json"), "{").unwrap();
    assert!(matches!(choose(&layout, None), Err(OciError::Json { .. })));
}

#[test]
fn what_docker_save_writes_is_read() {
    let layer = LayerTar::new().file("a", "1").bytes();
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["/e"]},
        "rootfs": {"diff_ids": [Digest::of(&layer).to_string(), Digest::of(&layer).to_string()]},
    })
    .to_string();
    let manifest = json!([{
        "Config": "c.json", "RepoTags": ["web:1"], "Layers": ["one/layer.tar", "two/layer.tar"],
    }])
    .to_string();
    let layer = String::from_utf8(layer).unwrap();
    let archive = LayerTar::new()
        .file("c.json", &config)
        .file("one/layer.tar", &layer)
        .symlink("two/layer.tar", "../one/layer.tar")
        .file("manifest.json", &manifest)
        .bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.tar");
    fs::write(&path, archive).unwrap();
    let source = open(&path);
    let chosen = oci::choose(&source, None).unwrap();
    assert_eq!(chosen.name.as_deref(), Some("web:1"));
    assert_eq!(chosen.layers.len(), 2);
    for layer in &chosen.layers {
        assert_eq!(source.blob(&layer.file).unwrap().size(), 2048);
    }
}

#[test]
fn other_files_are_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let message = oci::choose(&open(folder.path()), None)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("skopeo copy") && message.contains("oci-archive:"),
        "{message}"
    );
    let path = folder.path().join("text");
    fs::write(&path, "hello").unwrap();
    let open = |path: &Path| Source::open(path, folder.path(), 1 << 20).map(drop);
    assert!(matches!(open(&path), Err(SourceError::Archive { .. })));
    assert!(matches!(
        open(Path::new("/dev/null")),
        Err(SourceError::Kind { .. })
    ));
    assert!(matches!(
        open(Path::new("/nonexistent")),
        Err(SourceError::Open { .. })
    ));
    fs::write(&path, gzip(&vec![0; 4 << 20])).unwrap();
    assert!(matches!(open(&path), Err(SourceError::Uncompress { .. })));
}
