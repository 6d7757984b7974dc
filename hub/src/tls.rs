//! The hub's own certificate: the operator's, or one that the hub makes and agents pin.
//!
//! Encryption between agents does not rest on TLS; it hides from the network who talks to this hub.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("`{}`", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// A file holds no certificate or no key in PEM.
    #[error("`{}` holds no {what} in PEM", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The certificate and the key do not go together, or the key is of a kind that is not supported.
    #[error("certificate and key")]
    Rustls(#[from] rustls::Error),
    /// A certificate could not be made.
    #[error("making a certificate")]
    Rcgen(#[from] rcgen::Error),
}

/// The hub's side of TLS.
#[derive(Clone)]
pub struct Tls {
    /// For the accept loop.
    pub acceptor: TlsAcceptor,
    /// SHA-256 of the certificate (DER), when it is self-signed and agents must pin it.
    pub pin: Option<[u8; 32]>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("pin", &self.pin.map(hex::encode)).finish_non_exhaustive()
    }
}

/// Loads the operator's certificate chain and key, both in PEM.
///
/// # Errors
/// [`TlsError`].
pub fn load(cert_path: &Path, key_path: &Path) -> Result<Tls, TlsError> {
    let (chain, key) = read_pair(cert_path, key_path)?;
    Ok(Tls { acceptor: acceptor(chain, key)?, pin: None })
}

/// Loads the certificate that an earlier start made, or makes one for `names`.
///
/// The certificate stays the same for ever, whatever the names are by then: its hash is in every invite.
///
/// # Errors
/// [`TlsError`].
pub fn load_or_make(data_dir: &Path, names: Vec<String>) -> Result<Tls, TlsError> {
    let (cert_path, key_path) = (data_dir.join("tls.crt"), data_dir.join("tls.key"));
    if !cert_path.exists() {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names)?;
        // The certificate comes last: without it, both are made again.
        write_whole(&key_path, signing_key.serialize_pem().as_bytes(), 0o600)?;
        write_whole(&cert_path, cert.pem().as_bytes(), 0o644)?;
    }
    let (chain, key) = read_pair(&cert_path, &key_path)?;
    let pin = chain.first().map(|certificate| Sha256::digest(certificate).into());
    Ok(Tls { acceptor: acceptor(chain, key)?, pin })
}

fn read_pair(
    cert_path: &Path,
    key_path: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let read = |path: &Path| {
        fs::read(path).map_err(|source| TlsError::Io { path: path.to_owned(), source })
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(cert_path)?)
        .collect::<Result<_, _>>()
        .unwrap_or_default();
    if chain.is_empty() {
        return Err(TlsError::Pem { path: cert_path.to_owned(), what: "certificate" });
    }
    let key = PrivateKeyDer::from_pem_slice(&read(key_path)?)
        .map_err(|_| TlsError::Pem { path: key_path.to_owned(), what: "private key" })?;
    Ok((chain, key))
}

fn acceptor(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<TlsAcceptor, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let fresh = path.with_extension("new");
    let write = || {
        // A remnant keeps its mode when it is opened; a new file gets ours.
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().map_err(|source| TlsError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_certificate_and_its_pin_outlive_restarts_and_renames() {
        let dir = tempfile::tempdir().unwrap();
        let first = load_or_make(dir.path(), vec!["hub.example".to_owned()]).unwrap();
        let again = load_or_make(dir.path(), vec!["other.example".to_owned()]).unwrap();
        assert!(first.pin.is_some());
        assert_eq!(first.pin, again.pin);
        let mode = fs::metadata(dir.path().join("tls.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn files_without_pem_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("c"), dir.path().join("k"));
        fs::write(&cert, "no certificate").unwrap();
        fs::write(&key, "no key").unwrap();
        assert!(matches!(load(&cert, &key), Err(TlsError::Pem { path, .. }) if path == cert));
    }
}
