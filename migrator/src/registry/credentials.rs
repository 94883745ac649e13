//! Who we are to a registry: the file that `docker login`, `podman login` and `skopeo login` write.
//!
//! ```json
//! { "auths": { "registry.example.com": { "auth": "BASE64 OF USER:PASSWORD" } } }
//! ```
//!
//! The formats are docker's `config.json` and containers-auth.json(5): keys may be URLs, and may lead down to a
//! repository.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::reference::DOCKER_HUB;

/// A text that no log and no error shows.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one header it is meant for.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a registry is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    Anonymous,
    /// User and password, or what a registry gives in a password's place.
    Basic {
        /// User.
        user: String,
        /// Password.
        password: Secret,
    },
    /// What the token server takes in a password's place (OAuth2 refresh token).
    Identity(Secret),
    /// What the registry takes as it is.
    Bearer(Secret),
}

impl Credentials {
    /// Whether there are any.
    pub fn are_there(&self) -> bool {
        !matches!(self, Self::Anonymous)
    }
}

/// Why a credentials file is not used.
#[derive(Debug, thiserror::Error)]
pub enum BadCredentials {
    /// Not JSON of that form.
    #[error("it is not a credentials file as `docker login` or `skopeo login` writes it")]
    Parse(#[from] serde_json::Error),
    /// An entry that cannot be read.
    #[error("its entry for `{key}` has an `auth` that is not base64 of USER:PASSWORD")]
    Auth {
        /// The registry.
        key: String,
    },
    /// A program that holds the credentials.
    #[error(
        "the credentials for `{registry}` are kept by the program docker-credential-{helper}, which is not run here: \
         write them into the file with `skopeo login --authfile FILE {registry}`"
    )]
    Helper {
        /// The registry.
        registry: String,
        /// What the program's name ends in.
        helper: String,
    },
}

/// A parsed file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthFile {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
    registrytoken: Option<Secret>,
}

impl AuthFile {
    /// Parses a file.
    ///
    /// # Errors
    /// It is not of that format. Keys that are not about credentials are left alone: the file is not ours.
    pub fn parse(text: &[u8]) -> Result<Self, BadCredentials> {
        Ok(serde_json::from_slice(text)?)
    }

    /// What there is for `repository` of `registry`: the entry with the longest path that leads to it.
    ///
    /// # Errors
    /// The entry cannot be read, or only a program knows the credentials.
    pub fn find(&self, registry: &str, repository: &str) -> Result<Credentials, BadCredentials> {
        let helper = |helper: &String| BadCredentials::Helper {
            registry: registry.to_owned(),
            helper: helper.clone(),
        };
        if let Some((_, name)) = best(&self.cred_helpers, registry, repository) {
            return Err(helper(name));
        }
        match best(&self.auths, registry, repository) {
            // `docker login` with a store writes an empty entry.
            Some((key, entry)) => match (entry.read(key)?, &self.creds_store) {
                (Credentials::Anonymous, Some(store)) => Err(helper(store)),
                (found, _) => Ok(found),
            },
            None => Ok(Credentials::Anonymous),
        }
    }
}

fn best<'a, T>(
    entries: &'a BTreeMap<String, T>,
    registry: &str,
    repository: &str,
) -> Option<(&'a String, &'a T)> {
    let whole = format!("{registry}/{repository}");
    entries
        .iter()
        .filter_map(|(key, value)| Some((fit(key, &whole)?, key, value)))
        .max_by_key(|(length, _, _)| *length)
        .map(|(_, key, value)| (key, value))
}

/// How much of `whole` the key covers; `None` if it is about something else.
fn fit(key: &str, whole: &str) -> Option<usize> {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    // The names that docker writes for its own registry.
    let key = match key.trim_end_matches('/') {
        "index.docker.io/v1" | "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        key => key
            .strip_suffix("/v1")
            .or(key.strip_suffix("/v2"))
            .unwrap_or(key),
    };
    let rest = whole.strip_prefix(key)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(key.len())
}

impl Entry {
    fn read(&self, key: &str) -> Result<Credentials, BadCredentials> {
        let filled = |secret: &Option<Secret>| secret.clone().filter(|s| !s.0.is_empty());
        if let Some(token) = filled(&self.registrytoken) {
            return Ok(Credentials::Bearer(token));
        }
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Credentials::Identity(token));
        }
        if let Some(auth) = filled(&self.auth) {
            return split(&auth).ok_or_else(|| BadCredentials::Auth {
                key: key.to_owned(),
            });
        }
        Ok(match (&self.username, filled(&self.password)) {
            (Some(user), Some(password)) => Credentials::Basic {
                user: user.clone(),
                password,
            },
            (_, None) | (None, _) => Credentials::Anonymous,
        })
    }
}

fn split(auth: &Secret) -> Option<Credentials> {
    let bytes = STANDARD.decode(auth.0.trim()).ok()?;
    // Docker pads with NUL bytes.
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.trim_end_matches('\0').split_once(':')?;
    Some(Credentials::Basic {
        user: user.to_owned(),
        password: Secret(password.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic {
            user: user.to_owned(),
            password: Secret(password.to_owned()),
        }
    }

    fn file(text: &str) -> AuthFile {
        AuthFile::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_entry_with_the_longest_path_wins() {
        // "ann:secret", "team:s:t", "hub:hub"
        let file = file(
            r#"{ "HttpHeaders": {"X": "1"},
              "auths": {
                "reg.example:5000": {"auth": "YW5uOnNlY3JldA=="},
                "https://reg.example:5000/team": {"auth": "dGVhbTpzOnQ="},
                "https://index.docker.io/v1/": {"auth": "aHViOmh1Yg=="},
                "other.example": {"username": "u", "password": "p"} } }"#,
        );
        for (registry, repository, found) in [
            ("reg.example:5000", "a", basic("ann", "secret")),
            ("reg.example:5000", "team/a", basic("team", "s:t")),
            ("reg.example:5000", "teams/a", basic("ann", "secret")),
            ("docker.io", "library/redis", basic("hub", "hub")),
            ("other.example", "a", basic("u", "p")),
            ("reg.example", "a", Credentials::Anonymous),
            ("elsewhere.example", "a", Credentials::Anonymous),
        ] {
            assert_eq!(file.find(registry, repository).unwrap(), found);
        }
    }

    #[test]
    fn tokens_stand_before_passwords() {
        let file = file(
            r#"{"auths": {"a.example": {"auth": "YW5uOnNlY3JldA==", "identitytoken": "idt"},
                         "b.example": {"registrytoken": "rt"}}}"#,
        );
        let identity = file.find("a.example", "x").unwrap();
        assert_eq!(identity, Credentials::Identity(Secret("idt".to_owned())));
        let bearer = file.find("b.example", "x").unwrap();
        assert_eq!(bearer, Credentials::Bearer(Secret("rt".to_owned())));
    }

    #[test]
    fn credentials_that_a_program_keeps_are_named() {
        for text in [
            r#"{"credHelpers": {"reg.example": "pass"}}"#,
            r#"{"auths": {"reg.example": {}}, "credsStore": "pass"}"#,
        ] {
            let error = file(text).find("reg.example", "a").unwrap_err();
            assert!(error.to_string().contains("docker-credential-pass"));
        }
        // A store says nothing of registries where nobody logged in.
        let anonymous = file(r#"{"credsStore": "pass"}"#).find("reg.example", "a");
        assert_eq!(anonymous.unwrap(), Credentials::Anonymous);
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_an_error_and_shows_no_secret() {
        let file = file(r#"{"auths": {"reg.example": {"auth": "c2VjcmV0"}}}"#);
        let error = file.find("reg.example", "a").unwrap_err();
        assert!(matches!(error, BadCredentials::Auth { .. }));
        assert!(!format!("{file:?} {error:?}").contains("c2VjcmV0"));
        assert!(AuthFile::parse(b"{]").is_err());
        assert!(!format!("{:?}", basic("a", "hidden")).contains("hidden"));
    }
}
