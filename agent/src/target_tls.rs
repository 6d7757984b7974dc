//! TLS with a target, to see what it shows: nothing is sent over it that would have to be kept secret, so
//! whatever certificate it shows is taken, and judged afterwards.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use connect_spec::{
    check::{Printable, TlsReport},
    limits::{MAX_CHECK_NAMES, MAX_CHECK_TEXT_BYTES},
    objects::UnixTime,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, ProtocolVersion, RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime as PkiTime},
    server::ParsedCertificate,
    version::{TLS12, TLS13},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use crate::clock;

/// What came of a TLS handshake.
pub(crate) struct TargetTls {
    /// Over which to go on, if it was finished.
    pub(crate) stream: Option<TlsStream<TcpStream>>,
    /// What the target showed, if it came so far.
    pub(crate) report: Option<TlsReport>,
    /// Whether TLS is what it speaks, though it did not finish.
    pub(crate) speaks_tls: bool,
    /// Why it was not finished, in words.
    pub(crate) why: &'static str,
}

/// Begins TLS with a target under the name by which it is dialled.
pub(crate) async fn connect(host: &str, address: SocketAddr, tcp: TcpStream) -> TargetTls {
    let name =
        ServerName::try_from(host.to_owned()).unwrap_or(ServerName::IpAddress(address.ip().into()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let shown = Arc::new(Mutex::new(None));
    let recorder = Recorder { shown: shown.clone(), provider: provider.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("the provider knows both versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(recorder))
        .with_no_client_auth();
    let connected = TlsConnector::from(Arc::new(config)).connect(name.clone(), tcp).await;
    let chain = shown.lock().unwrap_or_else(PoisonError::into_inner).take();
    let version = match &connected {
        Ok(stream) => stream.get_ref().1.protocol_version(),
        Err(_) => None,
    };
    let report = chain.map(|chain| report(&chain, &name, version));
    match connected {
        Ok(stream) => TargetTls { stream: Some(stream), report, speaks_tls: true, why: "" },
        Err(error) => {
            let wrong = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            let (speaks_tls, why) = match wrong {
                Some(rustls::Error::PeerIncompatible(_)) => {
                    (true, "it speaks neither TLS 1.3 nor TLS 1.2")
                }
                Some(rustls::Error::AlertReceived(_)) => (true, "it refuses the TLS handshake"),
                Some(_) | None => (false, "it ends the TLS handshake"),
            };
            TargetTls { stream: None, report, speaks_tls, why }
        }
    }
}

/// The certificates that a target showed, its own first.
type Chain = Vec<CertificateDer<'static>>;

/// Takes every certificate, and keeps it. Signatures of the handshake are verified, so that it is the
/// target's own.
#[derive(Debug)]
struct Recorder {
    shown: Arc<Mutex<Option<Chain>>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Recorder {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: PkiTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = std::iter::once(end_entity).chain(intermediates);
        let chain = chain.map(|certificate| certificate.clone().into_owned()).collect();
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(chain);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn report(chain: &Chain, name: &ServerName<'_>, version: Option<ProtocolVersion>) -> TlsReport {
    let version = match version {
        Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
        Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
        Some(_) | None => "TLS",
    };
    let own = &chain[0];
    let parsed = X509Certificate::from_der(own).ok().map(|(_, parsed)| parsed);
    let valid = parsed.as_ref().map(|parsed| parsed.validity());
    let time = |time: i64| UnixTime::try_from(time).unwrap_or(0);
    let not_before = valid.map(|valid| time(valid.not_before.timestamp()));
    let not_after = valid.map(|valid| time(valid.not_after.timestamp()));
    let name_matches =
        ParsedCertificate::try_from(own).ok().map(|own| verify_server_name(&own, name).is_ok());
    // What is wrong with the time is seen by the times, so it is judged as of a time when it is valid.
    let now = clock::now().max(not_before.unwrap_or(0)).min(not_after.unwrap_or(UnixTime::MAX));
    TlsReport {
        version: Printable::of(version).expect("ours is printable"),
        names: parsed.as_ref().map(names).unwrap_or_default(),
        not_before,
        not_after,
        name_matches,
        trusted: is_trusted(chain, name, now),
    }
}

/// The names that a certificate is for; for an old one without, the common name.
fn names(certificate: &X509Certificate<'_>) -> Vec<Printable> {
    let alternative = certificate.subject_alternative_name().ok().flatten();
    let listed = alternative.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut names: Vec<String> = listed
        .iter()
        .filter_map(|name| {
            if let GeneralName::DNSName(name) = name {
                return Some((*name).to_owned());
            }
            let GeneralName::IPAddress(bytes) = name else { return None };
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok()?;
            Some(address.to_string())
        })
        .collect();
    if names.is_empty() {
        let common = certificate.subject().iter_common_name();
        names.extend(common.filter_map(|name| name.as_str().ok()).map(str::to_owned));
    }
    names.retain(|name| name.len() <= MAX_CHECK_TEXT_BYTES);
    names.iter().filter_map(|name| Printable::of(name)).take(MAX_CHECK_NAMES).collect()
}

/// Whether the system's authorities vouch for it; `None` where the system names none.
fn is_trusted(chain: &Chain, name: &ServerName<'_>, now: UnixTime) -> Option<bool> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().ok()?;
    let now = PkiTime::since_unix_epoch(std::time::Duration::from_secs(now));
    let verified = verifier.verify_server_cert(&chain[0], &chain[1..], name, &[], now);
    Some(match verified {
        Ok(_) => true,
        // The name is looked at last.
        Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => true,
        Err(_) => false,
    })
}
