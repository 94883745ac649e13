//! What a registry answers to a request without credentials (RFC 7235), as far as registries use it.

use http_auth::parser::ChallengeParser;

/// How the registry wants to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token with each request, from a token server (docker's token authentication).
    Bearer {
        /// Where the token server is.
        realm: String,
        /// What the registry is called there.
        service: Option<String>,
        /// What the token must be good for; ours if the registry does not say.
        scope: Option<String>,
    },
}

/// Of several `WWW-Authenticate` headers the challenge to meet: a token before a password.
pub(super) fn choose<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        // Behind an error the parser yields nothing more.
        for challenge in ChallengeParser::new(header).map_while(Result::ok) {
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
            if !challenge.scheme.eq_ignore_ascii_case("bearer") {
                continue;
            }
            let value = |wanted: &str| {
                let mut params = challenge.params.iter();
                let (_, value) = params.find(|(name, _)| name.eq_ignore_ascii_case(wanted))?;
                Some(value.to_unescaped())
            };
            if let Some(realm) = value("realm") {
                return Some(Challenge::Bearer {
                    realm,
                    service: value("service"),
                    scope: value("scope"),
                });
            }
        }
    }
    basic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_stands_before_a_password() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull""#;
        let expected = Some(Challenge::Bearer {
            realm: "https://auth.example/token".to_owned(),
            service: Some("reg".to_owned()),
            scope: Some("repository:a/b:pull".to_owned()),
        });
        assert_eq!(choose([r#"Basic realm="x""#, bearer]), expected);
        assert_eq!(choose([bearer]), expected);
        assert_eq!(choose([r#"BASIC realm="x""#]), Some(Challenge::Basic));
    }

    #[test]
    fn what_cannot_be_met_is_none() {
        for header in [
            "",
            "Negotiate",
            "Bearer service=\"x\"",
            "Bearer realm=\"",
            "\"\"",
        ] {
            assert_eq!(choose([header]), None, "{header}");
        }
    }
}
