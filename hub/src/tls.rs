//! The hub's own certificate: the operator's, or one that the hub makes and agents pin.
//!
//! Encryption between agents does not rest on TLS; it hides from the network who talks to this hub.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    version::{TLS12, TLS13},
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
    #[error("certificate and key do not go together, or are of a kind that is not supported")]
    Rustls(#[from] rustls::Error),
    /// A certificate could not be made.
    #[error("making a certificate")]
    Rcgen(#[from] rcgen::Error),
}

/// The hub's side of TLS.
pub struct Tls {
    /// What the next handshake is accepted with. Behind a lock that is held for a clone, and for a swap.
    acceptor: RwLock<TlsAcceptor>,
    /// The operator's files.
    files: Option<Files>,
    /// SHA-256 of the certificate (DER), when it is self-signed and agents must pin it.
    pub pin: Option<[u8; 32]>,
}

/// Where the operator's certificate is.
#[derive(Debug)]
struct Files {
    cert_path: PathBuf,
    key_path: PathBuf,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls")
            .field("files", &self.files)
            .field("pin", &self.pin.map(hex::encode))
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Loads the operator's certificate chain and key, both in PEM.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(cert_path: &Path, key_path: &Path) -> Result<Self, TlsError> {
        let (chain, key) = read_pair(cert_path, key_path)?;
        let acceptor = RwLock::new(acceptor(chain, key)?);
        let files = Files { cert_path: cert_path.to_owned(), key_path: key_path.to_owned() };
        Ok(Self { acceptor, files: Some(files), pin: None })
    }

    /// Loads the certificate that an earlier start made, or makes one for `names`.
    ///
    /// The certificate stays the same for ever, whatever the names are by then: its hash is in every invite.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load_or_make(data_dir: &Path, names: Vec<String>) -> Result<Self, TlsError> {
        let (cert_path, key_path) = (data_dir.join("tls.crt"), data_dir.join("tls.key"));
        if !cert_path.exists() {
            let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names)?;
            // The certificate comes last: without it, both are made again.
            write_whole(&key_path, signing_key.serialize_pem().as_bytes(), 0o600)?;
            write_whole(&cert_path, cert.pem().as_bytes(), 0o644)?;
        }
        let (chain, key) = read_pair(&cert_path, &key_path)?;
        let pin = chain.first().map(|certificate| Sha256::digest(certificate).into());
        Ok(Self { acceptor: RwLock::new(acceptor(chain, key)?), files: None, pin })
    }

    /// What accepts a handshake that begins now.
    #[must_use]
    pub fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the operator's files again. Connections keep what they began with, and no session of before
    /// can be resumed, so whoever comes next sees the new certificate. Without files there is nothing to
    /// read: false.
    ///
    /// # Errors
    /// [`TlsError`]; handshakes go on with what was loaded before.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let Some(Files { cert_path, key_path }) = &self.files else {
            return Ok(false);
        };
        let (chain, key) = read_pair(cert_path, key_path)?;
        let fresh = acceptor(chain, key)?;
        *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(true)
    }

    /// Whether the certificate is the operator's, which browsers and agents verify by an authority.
    #[must_use]
    pub fn is_operators(&self) -> bool {
        self.files.is_some()
    }
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
        .with_protocol_versions(&[&TLS13, &TLS12])?
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
        let first = Tls::load_or_make(dir.path(), vec!["hub.example".to_owned()]).unwrap();
        let again = Tls::load_or_make(dir.path(), vec!["other.example".to_owned()]).unwrap();
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
        assert!(matches!(Tls::load(&cert, &key), Err(TlsError::Pem { path, .. }) if path == cert));
    }

    /// Writes a new certificate and its key.
    fn write_pair(cert: &Path, key: &Path) {
        let CertifiedKey { cert: made, signing_key } =
            generate_simple_self_signed(vec!["hub.example".to_owned()]).unwrap();
        fs::write(cert, made.pem()).unwrap();
        fs::write(key, signing_key.serialize_pem()).unwrap();
    }

    #[test]
    fn files_that_do_not_load_leave_what_was_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("c"), dir.path().join("k"));
        write_pair(&cert, &key);
        let tls = Tls::load(&cert, &key).unwrap();
        let config = |tls: &Tls| Arc::clone(tls.acceptor().config());
        let first = config(&tls);
        // A certificate whose key has not been written yet, then half a file, then none.
        write_pair(&cert, &dir.path().join("other"));
        assert!(matches!(tls.reload(), Err(TlsError::Rustls(_))));
        fs::write(&cert, "-----BEGIN CERTIFICATE-----").unwrap();
        assert!(matches!(tls.reload(), Err(TlsError::Pem { path, .. }) if path == cert));
        fs::remove_file(&cert).unwrap();
        assert!(matches!(tls.reload(), Err(TlsError::Io { path, .. }) if path == cert));
        assert!(Arc::ptr_eq(&first, &config(&tls)));
        write_pair(&cert, &key);
        assert!(tls.reload().unwrap());
        assert!(!Arc::ptr_eq(&first, &config(&tls)));
    }
}
