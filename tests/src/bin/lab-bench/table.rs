//! The numbers, for people: median (least-most) of the repeats.

use std::fmt::Write;

use crate::results::{Results, Run};
use crate::workload::{Kind, Workload};

/// Where others had more of the machine than this in a run, its figures are not worth much.
const DISTURBED: f64 = 0.10;

const NAMES: [&str; 3] = ["raw", "Envoy", "Sealane"];

/// One line of the table.
struct Row {
    label: String,
    /// As in [`NAMES`]; empty where it does not apply.
    values: [Vec<f64>; 3],
    digits: usize,
}

/// The run's main figure.
pub fn headline(run: &Run) -> String {
    let (ops, bits) = (per_second(run), gbits(run));
    if run.sample.p50_us == 0.0 { format!("{bits:.1} Gbit/s") } else { format!("{}/s", number(ops, 0)) }
}

/// The whole table.
pub fn render(results: &Results, workloads: &[Workload]) -> String {
    let mut out = format!(
        "\nMedian (least-most) of {} runs of {} s. {} CPUs ({}), Linux {}; they carry clients, server and proxies.\n\n",
        results.repeats, results.seconds, results.cpus, results.cpu, results.kernel
    );
    let head = ["", NAMES[0], NAMES[1], NAMES[2], "of raw", "of Envoy"].map(str::to_owned);
    let mut lines = vec![head];
    for row in workloads.iter().flat_map(|workload| rows(results, workload)).chain(memory(results)) {
        lines.push(row.cells());
    }
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4, 5].map(width);
    for line in &lines {
        let _ = write!(out, "{:<1$}", line[0], widths[0]);
        for (cell, width) in line.iter().zip(widths).skip(1) {
            let _ = write!(out, "  {cell:>width$}");
        }
        out.push('\n');
    }
    out.push_str(&notes(results));
    out
}

fn rows(results: &Results, workload: &Workload) -> Vec<Row> {
    let row = |what: &str, digits: usize, figure: &dyn Fn(&Run) -> Option<f64>| {
        let of = |name: &str| {
            let runs = results.runs.iter().filter(|run| run.subject == name && run.workload == workload.name);
            runs.filter_map(figure).collect()
        };
        Row { label: format!("{}: {what}", workload.name), values: NAMES.map(of), digits }
    };
    // The load on the client and server is the same for all: what counts is what the proxies add.
    let cpu = |run: &Run, amount: f64| (run.subject != NAMES[0]).then_some(run.proxies_cpu_seconds / amount);
    match workload.kind {
        Kind::Bulk => vec![
            row("Gbit/s", 1, &|run| Some(gbits(run))),
            row("proxies' CPU s/GB", 2, &|run| cpu(run, run.sample.bytes as f64 / 1e9)),
        ],
        Kind::Rr | Kind::Crr => vec![
            row("per second", 0, &|run| Some(per_second(run))),
            row("p50 us", 0, &|run| Some(run.sample.p50_us)),
            row("p99 us", 0, &|run| Some(run.sample.p99_us)),
            row("proxies' CPU us each", 1, &|run| cpu(run, run.sample.ops as f64 / 1e6)),
        ],
    }
}

/// Of each proxy.
fn memory(results: &Results) -> Vec<Row> {
    let mib = |kib: &Vec<u64>| kib.iter().map(|kib| *kib as f64 / 1024.0).collect::<Vec<_>>();
    let of = |name: &str, at_end: bool| {
        let memory = results.memory.iter().find(|memory| memory.subject == name);
        memory.map(|memory| mib(if at_end { &memory.at_end } else { &memory.at_start })).unwrap_or_default()
    };
    [("memory at start", false), ("memory at end", true)]
        .map(|(label, at_end)| Row {
            label: format!("{label}: MiB each proxy"),
            values: NAMES.map(|name| of(name, at_end)),
            digits: 1,
        })
        .into()
}

fn notes(results: &Results) -> String {
    let mut out = String::new();
    let disturbed = results.runs.iter().filter(|run| run.others > DISTURBED).count();
    let most = results.runs.iter().map(|run| run.others).fold(0.0, f64::max);
    if disturbed > 0 {
        let _ = writeln!(
            out,
            "\nNot to be relied on: other processes had more than {:.0}% of the machine in {disturbed} of {} runs (up to {:.0}%).",
            DISTURBED * 100.0,
            results.runs.len(),
            most * 100.0
        );
    }
    out
}

impl Row {
    fn cells(&self) -> [String; 6] {
        let [raw, envoy, sealane] = &self.values;
        let ratio = |to: &[f64]| match (median(sealane), median(to)) {
            (Some(own), Some(other)) if other > 0.0 => format!("{:.2}", own / other),
            _ => String::new(),
        };
        let [a, b, c] = [raw, envoy, sealane].map(|values| self.cell(values));
        [self.label.clone(), a, b, c, ratio(raw), ratio(envoy)]
    }

    fn cell(&self, values: &[f64]) -> String {
        let Some(middle) = median(values) else { return "-".to_owned() };
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        let [middle, least, most] = [middle, least, most].map(|value| number(value, self.digits));
        format!("{middle} ({least}-{most})")
    }
}

fn per_second(run: &Run) -> f64 {
    run.sample.ops as f64 / run.sample.seconds
}

fn gbits(run: &Run) -> f64 {
    run.sample.bytes as f64 * 8.0 / 1e9 / run.sample.seconds
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    Some(if sorted.len().is_multiple_of(2) { (sorted[middle] + sorted[middle + 1]) / 2.0 } else { sorted[middle] })
}

/// With so many digits after the point, and commas between thousands.
fn number(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut out = String::new();
    for (at, digit) in whole.char_indices() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if fraction.is_empty() { out } else { format!("{out}.{fraction}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn numbers_have_commas() {
        assert_eq!(number(1_234_567.0, 0), "1,234,567");
        assert_eq!(number(12.345, 1), "12.3");
        assert_eq!(number(999.6, 0), "1,000");
    }
}
