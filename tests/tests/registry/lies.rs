//! Answers that no registry may give: each is refused with its name, and nothing of it is kept.

use anyhow::Result;
use migrator::image::{Digest, ManifestError};
use migrator::registry::{FetchError, PullError, RequestError};
use migrator_tests::registry::{Liar, answer};
use serde_json::json;

use super::{Puller, words};

/// What a pull from such a registry fails with.
fn pull(lie: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Result<PullError> {
    let (liar, puller) = (Liar::start(lie)?, Puller::new()?);
    let error = puller
        .plain(&format!("{}/app:1", liar.address()))
        .expect_err("it lies");
    assert!(puller.is_empty()?);
    Ok(error)
}

fn is_nonsense(error: &PullError) -> bool {
    matches!(error.request(), Some(RequestError::Nonsense { .. }))
}

/// A manifest of one blob, of so many bytes.
fn manifest(size: u64) -> String {
    let blob = |kind: &str| json!({ "mediaType": kind, "digest": Digest::of(b"blob").to_string(), "size": size });
    json!({
        "schemaVersion": 2,
        "config": blob("application/vnd.oci.image.config.v1+json"),
        "layers": [blob("application/vnd.oci.image.layer.v1.tar")],
    })
    .to_string()
}

#[test]
fn a_manifest_without_end_is_not_read() -> Result<()> {
    let announced = |_: &str, _: &str| {
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\nConnection: close\r\n\r\n{".to_vec()
    };
    let error = pull(announced)?;
    assert!(is_nonsense(&error), "{error:?}");
    // The same, without a word on its length.
    let silent = |_: &str, _: &str| {
        let mut all = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
        all.resize(all.len() + (6 << 20), b' ');
        all
    };
    let error = pull(silent)?;
    assert!(is_nonsense(&error), "{error:?}");
    assert!(words(&error).contains("more than"), "{error}");
    Ok(())
}

#[test]
fn a_token_that_no_header_can_carry_is_refused() -> Result<()> {
    for token in ["\"a\\nb\"", "17", "null"] {
        let error = pull(move |path, address| match path.starts_with("/token") {
            true => answer("200 OK", "", &format!("{{\"token\":{token}}}")),
            false => {
                let challenge =
                    format!("WWW-Authenticate: Bearer realm=\"http://{address}/token\"\r\n");
                answer("401 Unauthorized", &challenge, "")
            }
        })?;
        assert!(is_nonsense(&error), "{error:?}");
    }
    Ok(())
}

#[test]
fn a_manifest_that_is_another_than_its_digest_says_is_refused() -> Result<()> {
    let promised = format!("Docker-Content-Digest: {}\r\n", Digest::of(b"other"));
    let error = pull(move |_, _| answer("200 OK", &promised, &manifest(4)))?;
    assert!(
        matches!(
            error,
            PullError::Fetch {
                source: FetchError::OtherManifest { .. },
                ..
            }
        ),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn what_is_no_image_is_named() -> Result<()> {
    let old = r#"{"schemaVersion": 1, "fsLayers": []}"#;
    let error = pull(move |_, _| answer("200 OK", "", old))?;
    let is_old = |source: &ManifestError| matches!(source, ManifestError::Schema1);
    assert!(
        matches!(&error, PullError::Manifest { source, .. } if is_old(source)),
        "{error:?}"
    );
    let page = |_: &str, _: &str| answer("200 OK", "Content-Type: text/html\r\n", "<html>");
    let error = pull(page)?;
    assert!(words(&error).contains("is not valid"), "{error}");
    let error = pull(|_, _| answer("200 OK", "", &manifest(u64::MAX)))?;
    assert!(words(&error).contains("more than the limit"), "{error}");
    Ok(())
}

#[test]
fn a_blob_of_another_length_is_refused_before_it_is_read() -> Result<()> {
    let error = pull(|path, _| match path.contains("/blobs/") {
        true => answer("200 OK", "", "longer than four bytes"),
        false => answer("200 OK", "", &manifest(4)),
    })?;
    assert!(is_nonsense(&error), "{error:?}");
    assert!(
        words(&error).contains("where its manifest says 4"),
        "{error}"
    );
    Ok(())
}

#[test]
fn words_of_a_registry_are_cut_and_cleaned() -> Result<()> {
    let text = format!("no\u{1b}[31m{}", "x".repeat(10_000));
    let body = json!({ "errors": [{ "code": "DENIED", "message": text }] }).to_string();
    let error = pull(move |_, _| answer("403 Forbidden", "", &body))?;
    assert!(
        matches!(error.request(), Some(RequestError::Forbidden { .. })),
        "{error:?}"
    );
    let text = words(&error);
    assert!(!text.contains('\u{1b}') && text.len() < 1000, "{text}");
    Ok(())
}
