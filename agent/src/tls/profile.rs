//! What one certificate says of itself, against the X.509-SVID profile. Not who signed it.
//!
//! keyUsage need not be marked critical: what the key may do is the same without.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use sealane_common::reason::Reason;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER};
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::identity::SpiffeId;

/// What a leaf with the X.509-SVID profile says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its one URI SAN.
    pub id: SpiffeId,
    /// Since when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

/// Checks one certificate against the X.509-SVID profile of a leaf; not who signed it, nor when.
///
/// # Errors
/// The first line of the profile that it breaks.
pub fn leaf(der: &CertificateDer<'_>) -> Result<Leaf, Reason> {
    let certificate = parse(der).ok_or(Reason::CertificateMalformed)?;
    let usage = certificate.key_usage().map_err(malformed)?.map(|extension| extension.value);
    let constraints = certificate.basic_constraints().map_err(malformed)?.ok_or(Reason::CertificateNotLeaf)?;
    if constraints.value.ca || usage.is_some_and(|usage| usage.key_cert_sign() || usage.crl_sign()) {
        return Err(Reason::CertificateIsCa);
    }
    let id = spiffe_id(&certificate)?;
    if !usage.is_some_and(|usage| usage.digital_signature()) {
        return Err(Reason::CertificateKeyUsage);
    }
    let purposes = certificate.extended_key_usage().map_err(malformed)?;
    if purposes.is_some_and(|purposes| !(purposes.value.client_auth && purposes.value.server_auth)) {
        return Err(Reason::CertificateExtendedUsage);
    }
    let validity = certificate.validity();
    Ok(Leaf { id, not_before: system_time(validity.not_before), not_after: system_time(validity.not_after) })
}

/// True where the bytes are one certificate and nothing else.
pub fn parses(der: &CertificateDer<'_>) -> bool {
    parse(der).is_some()
}

/// True where a certificate may be a root: a CA, and its keyUsage, where it has one, lets it sign certificates.
pub fn is_root(der: &CertificateDer<'_>) -> bool {
    parse(der).is_some_and(|certificate| {
        let ca = certificate.basic_constraints().is_ok_and(|found| found.is_some_and(|found| found.value.ca));
        ca && certificate.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()))
    })
}

/// True where a certificate says that it may sign certificates, as X.509-SVID demands of an intermediate.
pub fn signs(der: &CertificateDer<'_>) -> bool {
    let usage =
        |certificate: X509Certificate<'_>| certificate.key_usage().ok()?.map(|usage| usage.value.key_cert_sign());
    parse(der).and_then(usage).unwrap_or(false)
}

/// uniformResourceIdentifier of GeneralName, RFC 5280.
const URI_TAG: u32 = 6;

/// A certificate that is one and nothing else.
pub(super) fn parse<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Some(certificate),
        Ok(_) | Err(_) => None,
    }
}

fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, Reason> {
    let names = certificate.subject_alternative_name().map_err(malformed)?;
    let names = names.as_ref().map_or(&[][..], |names| &names.value.general_names);
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        // Not text, so no SPIFFE ID either, but a URI all the same.
        GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => Some(""),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::DNSName(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => None,
    });
    match (uris.next(), uris.next()) {
        (None, _) => Err(Reason::SpiffeIdMissing),
        (Some(_), Some(_)) => Err(Reason::SpiffeIdAmbiguous),
        (Some(uri), None) => uri.parse().map_err(|_| Reason::SpiffeIdMalformed),
    }
}

/// The identifier of its own key.
pub(super) fn key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    let extension = certificate.get_extension_unique(&OID_X509_EXT_SUBJECT_KEY_IDENTIFIER).ok()??;
    let ParsedExtension::SubjectKeyIdentifier(id) = extension.parsed_extension() else { return None };
    Some(id.0)
}

/// The identifier of the key that it says it is signed with.
pub(super) fn issuer_key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    let extension = certificate.get_extension_unique(&OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER).ok()??;
    let ParsedExtension::AuthorityKeyIdentifier(id) = extension.parsed_extension() else { return None };
    id.key_identifier.as_ref().map(|id| id.0)
}

fn malformed<E>(_: E) -> Reason {
    Reason::CertificateMalformed
}

/// Before 1970 is 1970: nothing of ours is as old, and only validity depends on it.
pub(super) fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}
