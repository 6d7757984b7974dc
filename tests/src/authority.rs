//! An authority that signs certificates for hubs, right ones and wrong ones.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};

use crate::{process::new_dir, random_word};

/// An authority with files of its own.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    ca_path: PathBuf,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("ca_path", &self.ca_path).finish_non_exhaustive()
    }
}

/// Where a hub's certificate and key are.
#[derive(Debug)]
pub struct CertificateFiles {
    /// `--tls-cert`.
    pub cert_path: PathBuf,
    /// `--tls-key`.
    pub key_path: PathBuf,
}

/// What is wrong with a certificate, if anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Nothing.
    None,
    /// It ended at the beginning of 2020.
    Expired,
    /// It begins in 2200.
    NotYetValid,
    /// It signed itself, as `openssl req -x509` does.
    SelfSigned,
}

impl Authority {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, random_word());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let ca_path = new_dir("authority").join("ca.pem");
        fs::write(&ca_path, issuer.as_ref().pem()).expect("our own directory");
        Self { issuer, ca_path }
    }

    /// For `connect init --ca`.
    #[must_use]
    pub fn ca(&self) -> &str {
        path_text(&self.ca_path)
    }

    /// Signs a certificate for `name` and puts it in place of what was there.
    pub fn issue(&self, files: &CertificateFiles, name: &str, flaw: Flaw) {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, random_word());
        match flaw {
            Flaw::None => {}
            Flaw::Expired => params.not_after = date_time_ymd(2020, 1, 1),
            Flaw::NotYetValid => {
                params.not_before = date_time_ymd(2200, 1, 1);
                params.not_after = date_time_ymd(2201, 1, 1);
            }
            Flaw::SelfSigned => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
        }
        let key = KeyPair::generate().expect("a key");
        let signed = if flaw == Flaw::SelfSigned {
            params.self_signed(&key)
        } else {
            params.signed_by(&key, &self.issuer)
        };
        fs::write(&files.key_path, key.serialize_pem()).expect("our own directory");
        fs::write(&files.cert_path, signed.expect("a certificate").pem()).expect("as above");
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl CertificateFiles {
    /// Names of files that do not exist yet.
    #[must_use]
    pub fn new() -> Self {
        let dir = new_dir("certificate");
        Self { cert_path: dir.join("tls.crt"), key_path: dir.join("tls.key") }
    }

    /// The options of `connect-hub serve` that name them.
    #[must_use]
    pub fn options(&self) -> [&str; 4] {
        ["--tls-cert", path_text(&self.cert_path), "--tls-key", path_text(&self.key_path)]
    }
}

impl Default for CertificateFiles {
    fn default() -> Self {
        Self::new()
    }
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("our own directories have plain names")
}
