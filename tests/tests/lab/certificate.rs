//! A node's certificate and key, and ones that nobody here trusts.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// A certificate and its key, in PEM.
pub struct Identity {
    certificate: String,
    key: String,
}

/// The one that the lab made for the node of this folder.
pub fn read(dir: &Path) -> Result<Identity> {
    let file = |name: &str| {
        std::fs::read_to_string(dir.join(name)).with_context(|| format!("cannot read {name}"))
    };
    Ok(Identity {
        certificate: file("cert.pem")?,
        key: file("key.pem")?,
    })
}

/// Gives the node of this folder another one.
pub fn write(dir: &Path, identity: &Identity) -> Result<()> {
    std::fs::write(dir.join("cert.pem"), &identity.certificate)?;
    Ok(std::fs::write(dir.join("key.pem"), &identity.key)?)
}

/// One with the right name, of an authority that is not the lab's.
pub fn of_another_authority(name: &str) -> Result<Identity> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::<String>::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let issuer = Issuer::from_params(&authority, &authority_key);
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &issuer)?;
    Ok(Identity {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}
