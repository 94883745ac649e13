//! Credentials, tokens, certificates.

use std::path::PathBuf;

use anyhow::Result;
use migrator::registry::{PullError, PullOptions, RequestError};
use migrator_tests::registry::{Registry, Setup, TokenServer, log_in, umoci_image};
use serde_json::json;
use tempfile::TempDir;

use super::{Puller, oci, plain, words};

const USER: &str = "ann";
const PASSWORD: &str = "s:cret";

fn with_file(path: PathBuf) -> PullOptions {
    PullOptions {
        auth_file: Some(path),
        ..plain()
    }
}

fn is_unauthorized(error: &PullError, was_shown: bool) -> bool {
    matches!(error.request(), Some(RequestError::Unauthorized { shown, .. }) if *shown == was_shown)
}

#[test]
fn a_password_is_taken_from_the_file_that_skopeo_writes() -> Result<()> {
    let registry = Registry::start(&Setup {
        password: Some((USER, PASSWORD)),
        ..Setup::default()
    })?;
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let file = work.path().join("auth.json");
    log_in(&registry, USER, PASSWORD, &file)?;
    let layout = umoci_image(work.path(), 1)?;
    let words_of_skopeo = ["--dest-authfile".to_owned(), file.display().to_string()];
    let [a, b] = &words_of_skopeo;
    registry.store(&oci(&layout), "app:1", &[a, b])?;
    let name = format!("{}/app:1", registry.address());

    let error = puller.plain(&name).expect_err("nothing was shown");
    assert!(is_unauthorized(&error, false), "{error:?}");
    let wrong = work.path().join("wrong.json");
    let auth = json!({ "auths": { registry.address(): { "username": USER, "password": "no" } } });
    std::fs::write(&wrong, auth.to_string())?;
    let error = puller
        .pull(&name, &with_file(wrong))
        .expect_err("a wrong password");
    assert!(is_unauthorized(&error, true), "{error:?}");
    assert!(puller.is_empty()?);
    puller.pull(&name, &with_file(file.clone()))?;

    // The configured file does as well.
    let puller = Puller::with(&json!({ "auth_file": file }).to_string())?;
    puller.plain(&name)?;
    Ok(())
}

#[test]
fn credentials_files_that_cannot_be_used_are_named() -> Result<()> {
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let name = "127.0.0.1:1/app:1";
    let absent = work.path().join("absent.json");
    let error = puller.pull(name, &with_file(absent)).expect_err("no file");
    assert!(words(&error).contains("absent.json"), "{error}");
    let file = work.path().join("auth.json");
    std::fs::write(&file, r#"{"credHelpers": {"127.0.0.1:1": "pass"}}"#)?;
    let error = puller
        .pull(name, &with_file(file))
        .expect_err("a program's");
    assert!(words(&error).contains("docker-credential-pass"), "{error}");
    Ok(())
}

#[test]
fn a_token_is_fetched_and_fetched_anew_when_it_is_no_longer_good() -> Result<()> {
    let server = TokenServer::start(&format!("{USER}:{PASSWORD}"), 3600)?;
    let registry = Registry::start(&Setup {
        token: Some(&server),
        ..Setup::default()
    })?;
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let file = work.path().join("auth.json");
    log_in(&registry, USER, PASSWORD, &file)?;
    let layout = umoci_image(work.path(), 1)?;
    let auth = file.display().to_string();
    registry.store(&oci(&layout), "team/app:1", &["--dest-authfile", &auth])?;
    let name = format!("{}/team/app:1", registry.address());

    let error = puller.plain(&name).expect_err("nothing was shown");
    assert!(is_unauthorized(&error, false), "{error:?}");
    let before = server.given();
    puller.pull(&name, &with_file(file))?;
    assert_eq!(
        server.given() - before,
        1,
        "one token does for all requests"
    );

    // A registry that takes no token of this server: it is asked for once more, and then given up.
    let stranger = TokenServer::start(&format!("{USER}:{PASSWORD}"), -3600)?;
    let registry = Registry::start(&Setup {
        token: Some(&stranger),
        ..Setup::default()
    })?;
    let file = work.path().join("stranger.json");
    let auth =
        json!({ "auths": { registry.address(): { "username": USER, "password": PASSWORD } } });
    std::fs::write(&file, auth.to_string())?;
    let name = format!("{}/team/app:1", registry.address());
    let error = puller
        .pull(&name, &with_file(file))
        .expect_err("tokens that are over");
    assert!(is_unauthorized(&error, true), "{error:?}");
    assert_eq!(stranger.given(), 1);
    Ok(())
}

#[test]
fn an_identity_token_stands_in_for_a_password() -> Result<()> {
    let server = TokenServer::start("an identity+token", 3600)?;
    let registry = Registry::start(&Setup {
        token: Some(&server),
        ..Setup::default()
    })?;
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let file = work.path().join("auth.json");
    let auth = json!({ "auths": { registry.address(): { "identitytoken": "an identity+token" } } });
    std::fs::write(&file, auth.to_string())?;
    let name = format!("{}/app:1", registry.address());
    // The registry lets it in, and has nothing: it takes a session with a push to store something.
    let error = puller
        .pull(&name, &with_file(file))
        .expect_err("nothing is there");
    assert!(
        matches!(error.request(), Some(RequestError::Missing { .. })),
        "{error:?}"
    );
    assert_eq!(server.given(), 1);
    Ok(())
}

#[test]
fn only_certificates_of_known_authorities_are_trusted() -> Result<()> {
    let registry = Registry::start(&Setup {
        tls: true,
        ..Setup::default()
    })?;
    let (work, puller) = (TempDir::new()?, Puller::new()?);
    let layout = umoci_image(work.path(), 1)?;
    registry.store(&oci(&layout), "app:1", &[])?;
    let name = format!("{}/app:1", registry.address());
    let secure = PullOptions::default();

    let error = puller.pull(&name, &secure).expect_err("not trusted");
    assert!(
        matches!(error.request(), Some(RequestError::Untrusted { .. })),
        "{error:?}"
    );
    let puller = Puller::with(&json!({ "ca": registry.ca() }).to_string())?;
    puller.pull(&name, &secure)?;

    let open = Registry::open()?;
    let error = puller
        .pull(&format!("{}/app:1", open.address()), &secure)
        .expect_err("it does not speak TLS");
    assert!(
        matches!(error.request(), Some(RequestError::NoTls { .. })),
        "{error:?}"
    );
    let puller = Puller::with(&json!({ "ca": work.path().join("none.pem") }).to_string())?;
    let error = puller.pull(&name, &secure).expect_err("no such file");
    assert!(words(&error).contains("none.pem"), "{error}");
    Ok(())
}
