//! SPIFFE IDs and trust domains, parsed once. <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A trust domain: `[a-z0-9._-]`, 1 to 255 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A workload's SPIFFE ID, `spiffe://trust-domain/path`. Opaque: the path has no meaning to Sealane.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    id: Arc<str>,
    trust_domain: TrustDomain,
}

/// Why a text is not a SPIFFE ID or a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The scheme is missing or another one.
    #[error("does not begin with spiffe://")]
    Scheme,
    /// Empty, too long, or a character outside `[a-z0-9._-]` (a port, user info, percent-encoding or capitals).
    #[error("the trust domain must be 1 to 255 of a-z 0-9 . _ -")]
    TrustDomain,
    /// No path: the ID of a trust domain, not of a workload.
    #[error("has no path: that names a trust domain, not a workload")]
    NoPath,
    /// An empty, `.` or `..` segment, a trailing slash, or a character outside `[A-Za-z0-9._-]` (a query, a fragment).
    #[error("each path segment must be of A-Z a-z 0-9 . _ - and neither empty nor . nor ..")]
    Path,
    /// Longer than 2,048 bytes.
    #[error("is longer than 2048 bytes")]
    TooLong,
}

impl TrustDomain {
    /// As in the ID, without the scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(IdError::TrustDomain);
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.id
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path, with its leading slash.
    pub fn path(&self) -> &str {
        &self.id["spiffe://".len() + self.trust_domain.0.len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() > 2048 {
            return Err(IdError::TooLong);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(IdError::Scheme)?;
        let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
        let trust_domain = domain.parse()?;
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.bytes().all(allowed);
        match path {
            None | Some("") => Err(IdError::NoPath),
            Some(path) if path.split('/').all(segment) => Ok(Self { id: text.into(), trust_domain }),
            Some(_) => Err(IdError::Path),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_the_standard_allows() {
        for text in ["spiffe://td/front", "spiffe://shop.example/ns/shop/sa/web", "spiffe://a_b-c.1/X/...a/b_c"] {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!(id.as_str(), text);
            assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        }
    }

    #[test]
    fn refuses_what_it_forbids() {
        let long = format!("spiffe://td/{}", "a".repeat(2040));
        let long_domain = format!("spiffe://{}/a", "a".repeat(256));
        let cases = [
            ("https://td/a", IdError::Scheme),
            ("SPIFFE://td/a", IdError::Scheme),
            ("spiffe:///a", IdError::TrustDomain),
            ("spiffe://TD/a", IdError::TrustDomain),
            ("spiffe://td:80/a", IdError::TrustDomain),
            ("spiffe://u@td/a", IdError::TrustDomain),
            ("spiffe://t%64/a", IdError::TrustDomain),
            (&long_domain, IdError::TrustDomain),
            ("spiffe://td", IdError::NoPath),
            ("spiffe://td/", IdError::NoPath),
            ("spiffe://td/a/", IdError::Path),
            ("spiffe://td//a", IdError::Path),
            ("spiffe://td/./a", IdError::Path),
            ("spiffe://td/a/..", IdError::Path),
            ("spiffe://td/a?b", IdError::Path),
            ("spiffe://td/a#b", IdError::Path),
            ("spiffe://td/%61", IdError::Path),
            (&long, IdError::TooLong),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<SpiffeId>(), Err(error), "{text}");
        }
    }
}
