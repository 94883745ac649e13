//! The lab's own certificate authority, and a certificate for each node.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

use super::Lab;

/// The name in the certificate of node `name`: what its peers check.
fn subject_alternative_name(name: &str) -> String {
    format!("{name}.migrator")
}

pub(super) fn write(lab: &Lab) -> Result<()> {
    let authority_key = KeyPair::generate().context("cannot make a key")?;
    let mut authority = CertificateParams::new(Vec::<String>::new())?;
    authority.distinguished_name = named("migrator lab");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_pem = authority
        .self_signed(&authority_key)
        .context("cannot sign the authority")?
        .pem();
    let issuer = Issuer::from_params(&authority, &authority_key);
    for node in lab.topology().nodes() {
        let node = *node;
        let dir = lab.node_dir(node);
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let key = KeyPair::generate().context("cannot make a key")?;
        let mut params = CertificateParams::new(vec![subject_alternative_name(node.name())])?;
        params.distinguished_name = named(node.name());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params
            .signed_by(&key, &issuer)
            .context("cannot sign a node's certificate")?;
        write_file(&dir.join("ca.pem"), &authority_pem, 0o644)?;
        write_file(&dir.join("cert.pem"), &certificate.pem(), 0o644)?;
        write_file(&dir.join("key.pem"), &key.serialize_pem(), 0o600)?;
    }
    Ok(())
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn write_file(path: &Path, text: &str, mode: u32) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot protect {}", path.display()))
}
