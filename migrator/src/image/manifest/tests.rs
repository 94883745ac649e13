use serde_json::{Value, json};

use super::*;

fn digest(of: &str) -> String {
    Digest::of(of.as_bytes()).to_string()
}

fn entry(of: &str, platform: Option<Value>) -> Value {
    let mut entry = json!({ "mediaType": MANIFESTS[0], "digest": digest(of), "size": 7 });
    if let Some(platform) = platform {
        entry["platform"] = platform;
    }
    entry
}

fn index(entries: &[Value]) -> Vec<u8> {
    json!({ "schemaVersion": 2, "mediaType": INDEXES[0], "manifests": entries })
        .to_string()
        .into_bytes()
}

fn find(bytes: &[u8], platform: &str) -> Result<Found, ManifestError> {
    read(bytes, None, &platform.parse().unwrap())
}

fn choice(of: &str) -> Found {
    Found::Choice(Blob {
        digest: Digest::of(of.as_bytes()),
        size: 7,
    })
}

fn on(architecture: &str, variant: Option<&str>) -> Option<Value> {
    Some(json!({ "os": "linux", "architecture": architecture, "variant": variant }))
}

#[test]
fn of_many_platforms_the_guests_is_chosen() {
    let bytes = index(&[
        entry("arm", on("arm64", Some("v8"))),
        entry("v3", on("amd64", Some("v3"))),
        entry("plain", on("amd64", None)),
        entry(
            "att",
            Some(json!({ "os": "unknown", "architecture": "unknown" })),
        ),
    ]);
    assert_eq!(find(&bytes, "linux/amd64").unwrap(), choice("plain"));
    assert_eq!(find(&bytes, "linux/amd64/v3").unwrap(), choice("v3"));
    let only = index(&[entry("v2", on("amd64", Some("v2")))]);
    assert_eq!(find(&only, "linux/amd64").unwrap(), choice("v2"));
    let error = find(&bytes, "linux/amd64/v9").unwrap_err().to_string();
    assert!(
        error.contains("linux/amd64/v9, only for: linux/amd64, linux/amd64/v3, linux/arm64/v8"),
        "{error}"
    );
    let bare = index(&[entry("bare", None)]);
    assert_eq!(find(&bare, "linux/amd64").unwrap(), choice("bare"));
}

#[test]
fn platforms_of_no_pod_are_refused() {
    for text in [
        "linux/arm64",
        "windows/amd64",
        "amd64",
        "linux/amd64/v3/x",
        "",
    ] {
        assert!(text.parse::<Platform>().is_err(), "{text}");
    }
}

#[test]
fn a_manifest_names_its_blobs_once() {
    let blob = |of: &str, kind: &str| json!({ "mediaType": kind, "digest": digest(of), "size": 3 });
    let layer = blob("l", "application/vnd.oci.image.layer.v1.tar+gzip");
    let mut manifest = json!({
        "schemaVersion": 2,
        "config": blob("c", CONFIGS[0]),
        "layers": [layer.clone(), layer],
    });
    let read_it = |manifest: &Value| {
        read(
            manifest.to_string().as_bytes(),
            Some("application/json; charset=utf-8"),
            &Platform::default(),
        )
    };
    let Found::Image(image) = read_it(&manifest).unwrap() else {
        panic!("not an image");
    };
    assert_eq!((image.layers.len(), image.blobs().len()), (2, 2));
    manifest["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
    assert!(matches!(
        read_it(&manifest),
        Err(ManifestError::Artifact(_))
    ));
    manifest["config"]["mediaType"] = json!(CONFIGS[1]);
    manifest["layers"][1]["mediaType"] =
        json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
    assert!(matches!(read_it(&manifest), Err(ManifestError::Foreign(_))));
    manifest["layers"] = json!(vec![blob("l", "x"); MAX_LAYERS + 1]);
    assert!(matches!(read_it(&manifest), Err(ManifestError::Layers(_))));
}

#[test]
fn what_is_not_known_is_named() {
    let unknown = json!({ "schemaVersion": 2, "mediaType": "text/x-riddle" });
    let error = find(unknown.to_string().as_bytes(), "linux/amd64").unwrap_err();
    assert!(error.to_string().contains("text/x-riddle"));
    let old = json!({ "schemaVersion": 1, "fsLayers": [] });
    let error = find(old.to_string().as_bytes(), "linux/amd64").unwrap_err();
    assert!(matches!(error, ManifestError::Schema1));
    assert!(matches!(
        find(b"<html>", "linux/amd64"),
        Err(ManifestError::Json(_))
    ));
}
