//! By what a hub's certificate is verified, and what is said when it does not hold.
//!
//! A pin stands for itself. Without one, the certificate is verified against the authorities of the system
//! or against those of a file (`--ca`), and never against nothing.

use std::{fmt, sync::Arc};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, RootCertStore,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    version::{TLS12, TLS13},
};
use sha2::{Digest, Sha256};

use crate::{
    clock,
    error::{Error, ErrorKind, Result},
};

/// Certificates of authorities, from a file of the user's: they count in place of the system's.
#[derive(Clone)]
pub struct HubCa {
    pem: Arc<[u8]>,
    roots: Arc<RootCertStore>,
}

impl fmt::Debug for HubCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubCa").field("certificates", &self.roots.len()).finish()
    }
}

impl HubCa {
    /// Reads one certificate or more in PEM.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is none, or one that cannot be read.
    pub fn from_pem(pem: &[u8]) -> Result<Self> {
        let no_certificate = || {
            Error::new(ErrorKind::Usage, "no certificate in PEM")
                .hint("a certificate begins with `-----BEGIN CERTIFICATE-----`")
        };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|_| no_certificate())?;
            roots.add(certificate).map_err(|_| {
                Error::new(ErrorKind::Usage, "a certificate that cannot be read")
                    .hint("was the file cut, or changed?")
            })?;
        }
        if roots.is_empty() {
            return Err(no_certificate());
        }
        Ok(Self { pem: pem.into(), roots: Arc::new(roots) })
    }

    /// What [`HubCa::from_pem`] read.
    pub(crate) fn pem(&self) -> &[u8] {
        &self.pem
    }
}

/// By what the certificate of a hub is verified.
#[derive(Debug, Clone)]
pub(crate) enum Verification {
    /// It is the certificate with this SHA-256.
    Pin([u8; 32]),
    /// One of these authorities signed it.
    Authorities(HubCa),
    /// An authority that the system trusts signed it.
    System,
}

impl Verification {
    /// TLS for one connection. Sessions are not resumed, so that each shows and verifies a certificate.
    pub(crate) fn client_config(&self) -> std::result::Result<Arc<ClientConfig>, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13, &TLS12])?;
        let mut config = match self {
            Self::Pin(pin) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(PinVerifier { pin: *pin, provider }))
                .with_no_client_auth(),
            Self::Authorities(ca) => {
                builder.with_root_certificates(ca.roots.clone()).with_no_client_auth()
            }
            Self::System => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                builder.with_root_certificates(roots).with_no_client_auth()
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// What a failed handshake with `hub` says, and what to do about it.
    pub(crate) fn explain(&self, hub: &impl fmt::Display, error: &std::io::Error) -> Error {
        let unreachable = |cause: &dyn fmt::Display| {
            let message = format_args!("cannot reach the hub {hub}: {cause}");
            Error::new(ErrorKind::HubUnreachable, message)
        };
        let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())
        else {
            return unreachable(&format_args!(
                "the connection ended in the TLS handshake: {error}"
            ))
            .hint("the other end hung up: has it too much to do just now, or is it no hub?");
        };
        tracing::debug!(%error, "TLS");
        if let rustls::Error::InvalidCertificate(wrong) = error {
            if *wrong == CertificateError::ApplicationVerificationFailure {
                return Error::trust(format_args!(
                    "the certificate of {hub} is not the one that was pinned"
                ));
            }
            let (cause, hint) = self.explain_certificate(wrong);
            return unreachable(&cause).hint(hint);
        }
        if matches!(
            error,
            rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
                | rustls::Error::PeerIncompatible(_)
        ) {
            return unreachable(&"it speaks neither TLS 1.3 nor TLS 1.2 as this program does")
                .hint("is a proxy in front of the hub out of date?");
        }
        if let rustls::Error::AlertReceived(_) = error {
            return unreachable(&"it refused the TLS handshake")
                .hint("does the hub, or a proxy in front of it, know this name?");
        }
        unreachable(&"something answers there, but it does not speak TLS")
            .hint("is the port right? A hub on loopback speaks `http://`")
    }

    fn explain_certificate(&self, wrong: &CertificateError) -> (String, &'static str) {
        const UNKNOWN: &str = "`connect init --ca FILE` and `connect join --ca FILE` name the authority \
             that signed it; or pin the certificate itself: `https://host:port#sha256=…`, as the hub's \
             operator has it";
        let when = |time: &UnixTime| clock::date(time.as_secs());
        if let CertificateError::NotValidForNameContext { expected, presented } = wrong {
            let names = names(presented);
            let cause = format!("its certificate is for {names}, not for `{}`", expected.to_str());
            return (
                cause,
                "dial the hub by a name in its certificate, or correct the certificate",
            );
        }
        if let CertificateError::ExpiredContext { not_after, .. } = wrong {
            let cause = format!("its certificate expired on {}", when(not_after));
            return (cause, "the hub's operator must renew it; or is this machine's clock wrong?");
        }
        if let CertificateError::NotValidYetContext { not_before, .. } = wrong {
            let cause = format!("its certificate is not valid before {}", when(not_before));
            return (cause, "is this machine's clock wrong?");
        }
        let (cause, hint) = if *wrong == CertificateError::UnknownIssuer {
            let nobody = match self {
                Self::Authorities(_) => "no authority of `--ca` signed its certificate",
                Self::System | Self::Pin(_) => {
                    "no authority that this machine trusts signed its certificate"
                }
            };
            (nobody, UNKNOWN)
        } else if matches!(wrong, CertificateError::Other(_)) {
            // What `openssl req -x509` makes.
            (
                "its certificate signed itself, or is one of an authority and not of a server",
                UNKNOWN,
            )
        } else {
            (
                "its certificate is not a valid one for a server",
                "the hub's operator must replace it; CONNECT_LOG=debug says more",
            )
        };
        (cause.to_owned(), hint)
    }
}

/// The names of a certificate as rustls writes them (`DnsName("a.example")`, `IpAddress(10.0.0.1)`), as
/// people do. The certificate is not verified: nothing of it that could hide or act reaches a terminal.
fn names(presented: &[String]) -> String {
    const SHOWN: usize = 5;
    let bare = presented.iter().filter_map(|name| {
        let (_, value) = name.strip_suffix(')')?.split_once('(')?;
        let value = value.trim_matches('"');
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-*:_".contains(&byte);
        (value.len() <= 253 && value.bytes().all(plain)).then(|| format!("`{value}`"))
    });
    let mut bare: Vec<_> = bare.take(SHOWN + 1).collect();
    if bare.len() > SHOWN {
        bare.truncate(SHOWN);
        bare.push("others".to_owned());
    }
    if bare.is_empty() { "no name".to_owned() } else { bare.join(", ") }
}

/// Accepts exactly the certificate whose SHA-256 the invite carries, whatever it says of itself.
#[derive(Debug)]
struct PinVerifier {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let found: [u8; 32] = Sha256::digest(end_entity).into();
        if found == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_certificate_are_shown_as_people_write_them() {
        let check = |presented: &[&str], expected: &str| {
            let presented: Vec<_> = presented.iter().map(|&name| name.to_owned()).collect();
            assert_eq!(names(&presented), expected);
        };
        check(&["DnsName(\"a.example\")", "IpAddress(10.0.0.1)"], "`a.example`, `10.0.0.1`");
        check(
            &["IpAddress(2001:db8::1)", "DnsName(\"*.b.example\")"],
            "`2001:db8::1`, `*.b.example`",
        );
        check(&[], "no name");
        check(&["DnsName(\"\u{1b}[2J\")", "DirectoryName", "Odd(a b)"], "no name");
        let many = ["DnsName(\"a\")"; 9];
        check(&many, "`a`, `a`, `a`, `a`, `a`, others");
    }

    #[test]
    fn files_without_a_certificate_name_no_authority() {
        for pem in ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            let error = HubCa::from_pem(pem.as_bytes()).expect_err("no certificate");
            assert_eq!(error.kind, ErrorKind::Usage);
        }
    }
}
