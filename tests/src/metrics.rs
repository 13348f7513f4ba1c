//! The Prometheus text format, read back.

use std::collections::BTreeMap;

/// Every sample of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the text; lines that are no samples are skipped.
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect() }
    }

    /// The sum of the samples of that name which have all of these labels; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &Sample| labels.iter().all(|(k, v)| sample.labels.get(*k).is_some_and(|value| value == v));
        self.samples.iter().filter(|sample| sample.name == name && has(sample)).map(|sample| sample.value).sum()
    }

    /// How often the kernel programs decided so.
    pub fn kernel(&self, reason: &str) -> f64 {
        self.sum("sealane_kernel_events_total", &[("reason", reason)])
    }

    /// Connections that were refused before they were carried.
    pub fn refused(&self, direction: &str, reason: &str) -> f64 {
        self.sum("sealane_connections_refused_total", &[("direction", direction), ("reason", reason)])
    }

    /// Every sample whose name begins so and which is not 0, as `name{labels} value`.
    pub fn lines(&self, prefix: &str) -> Vec<String> {
        let shown = self.samples.iter().filter(|sample| sample.name.starts_with(prefix) && sample.value != 0.0);
        shown.map(Sample::line).collect()
    }
}

impl Sample {
    fn line(&self) -> String {
        let labels: Vec<_> = self.labels.iter().map(|(k, v)| format!("{k}={v:?}")).collect();
        format!("{}{{{}}} {}", self.name, labels.join(","), self.value)
    }
}

/// `name{label="value",...} number`, with `\\`, `\"` and `\n` in values.
fn sample(line: &str) -> Option<Sample> {
    let (head, value) = line.rsplit_once(' ')?;
    let (name, mut rest) = head.split_once('{').map_or((head, ""), |(name, rest)| (name, rest));
    let mut labels = BTreeMap::new();
    while let Some((key, after)) = rest.split_once("=\"") {
        let (text, after) = unquote(after)?;
        labels.insert(key.trim_start_matches(',').to_owned(), text);
        rest = after;
    }
    Some(Sample { name: name.to_owned(), labels, value: value.parse().ok()? })
}

/// The text up to the closing quote, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let (mut out, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => out.push('\n'),
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_and_sums() {
        let text =
            "# TYPE x counter\nx_total{a=\"1\",b=\"p,\\\"q=\\\"\"} 3\nx_total{a=\"2\",b=\"r\"} 4\ny 0.5\n# EOF\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("x_total", &[]), 7.0);
        assert_eq!(metrics.sum("x_total", &[("a", "1"), ("b", "p,\"q=\"")]), 3.0);
        assert_eq!(metrics.sum("x_total", &[("a", "3")]), 0.0);
        assert_eq!(metrics.sum("y", &[]), 0.5);
        assert_eq!(metrics.lines("y"), ["y{} 0.5"]);
    }
}
