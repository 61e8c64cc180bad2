//! The heads of gated attention against f64: norms, partial RoPE, and where queries, keys, values and gates are stored.

use crate::support::kernel;

use dflash::gpu::device::Device;
use dflash::gpu::kernels::heads::{Heads, HeadsBuffers};
use kernel::*;

const PAGE: usize = 64;
const EPS: f32 = 1e-6;

/// Rows whose queries, keys or values are not stored, and rows that are out of range, leave the poison.
#[test]
fn heads_are_normed_rotated_and_stored() {
    for (heads, kv_heads, head_dim, rotary_dims) in
        [(2, 1, 256, 64), (4, 2, 128, 32), (3, 3, 64, 64), (1, 1, 256, 256)]
    {
        let mut random = Random::new(head_dim as u64 + rotary_dims as u64);
        let (pages, sequences, sequence_pages, positions, query_rows) = (5, 2, 2, 90, 6);
        let columns = 2 * (heads + kv_heads) * head_dim;
        // Sequence, position, slot, query.
        let none = u32::MAX;
        let rows: Vec<[u32; 4]> = vec![
            [0, 3, 3, 0],
            [1, 77, 70, 5],
            [1, 200, 71, 2], // beyond the RoPE table: its last row
            [0, 5, none, 1],
            [none, 0, none, none],
            [2, 1, 1, 3],   // no such sequence
            [0, 1, 128, 6], // no such slot, no such query
            [0, 4, 64, none],
        ];
        let pitch = columns + 4;
        let input = random.normals(rows.len() * pitch, 2.0);
        let gains = [random.normals(head_dim, 1.0), random.normals(head_dim, 1.0)];
        let rope = random.normals(positions * rotary_dims, 1.0);
        let table: Vec<u32> = vec![3, 9, 1, 4]; // page 9 does not exist
        let widths = [query_rows * heads * head_dim, pages * kv_heads * PAGE * head_dim];
        let run = |device: &dyn Device| {
            let out = [0, 0, 1, 1].map(|kind| poisoned::<u16>(device, widths[kind]));
            let [queries, gates, keys, values] = &out;
            let kernel = Heads {
                rows: rows.len(),
                pitch,
                heads,
                kv_heads,
                head_dim,
                rotary_dims,
                query_rows,
                pages,
                sequences,
                sequence_pages,
                positions,
                eps: EPS,
            };
            let [q_gain, k_gain] = gains.each_ref().map(|gain| upload(device, gain));
            let (input, rope) = (upload(device, &input), upload(device, &rope));
            let (rows, table) = (upload(device, &rows.concat()), upload(device, &table));
            let (rows, table, gains) = (&rows, &table, [&q_gain, &k_gain]);
            let buffers =
                HeadsBuffers { input: &input, rows, queries, gates, keys, values, table, gains, rope: &rope };
            kernel.launch(device, &buffers).unwrap();
            out.iter().flat_map(|buffer| bytes_of(device, buffer)).collect()
        };
        let mut found = from_bytes::<u16>(&same_bits(run));
        let mut take = |count: usize| found.drain(..count).collect::<Vec<u16>>();
        let [queries, gates] = [take(widths[0]), take(widths[0])];
        let [keys, values] = [take(widths[1]), take(widths[1])];

        let head_of = |row: usize, head: usize| &input[row * pitch + head * head_dim..][..head_dim];
        let rotated = |row: usize, head: usize| -> Vec<f32> {
            let (x, gain) = (head_of(row, head), &gains[usize::from(head >= heads)]);
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / head_dim as f64;
            let rms = (mean + f64::from(EPS)).sqrt();
            let x: Vec<f64> =
                x.iter().zip(gain).map(|(x, gain)| f64::from(*x) / rms * f64::from(*gain)).collect();
            let angles = &rope[(rows[row][1] as usize).min(positions - 1) * rotary_dims..][..rotary_dims];
            let half = rotary_dims / 2;
            let at = |d: usize| match d {
                d if d < half => x[d] * f64::from(angles[d]) - x[d + half] * f64::from(angles[d + half]),
                d if d < rotary_dims => {
                    x[d] * f64::from(angles[d - half]) + x[d - half] * f64::from(angles[d])
                }
                d => x[d],
            };
            (0..head_dim).map(|d| at(d) as f32).collect()
        };
        let mut expected_queries = vec![POISON; widths[0]];
        let mut expected_gates = expected_queries.clone();
        let mut expected = [vec![POISON; widths[1]], vec![POISON; widths[1]]];
        let bounds = |name: &str, found: &[u16], expected: &[f32]| {
            let error = relative_error(&from_bf16(found), expected);
            assert!(error < 3e-3, "{name} of {heads} heads of {head_dim}: {error:.1e}");
        };
        for (r, &[sequence, _, slot, query]) in rows.iter().enumerate() {
            for head in (0..heads).filter(|_| sequence < 2 && query < query_rows as u32) {
                let at = (query as usize * heads + head) * head_dim;
                bounds("a query", &queries[at..at + head_dim], &rotated(r, head));
                expected_queries[at..at + head_dim].copy_from_slice(&queries[at..at + head_dim]);
                expected_gates[at..at + head_dim]
                    .copy_from_slice(&to_bf16(head_of(r, heads + 2 * kv_heads + head)));
            }
            let Some(&page) = table.get(sequence as usize % 2 * 2 + slot as usize / PAGE) else { continue };
            if sequence >= 2 || slot as usize >= 2 * PAGE || page >= pages as u32 {
                continue;
            }
            for head in 0..kv_heads {
                let token = slot as usize % PAGE;
                let row = ((page as usize * kv_heads + head) * PAGE + token) * head_dim;
                let chunk = |d: usize| row + ((d / 8) ^ (token & 7)) * 8 + d % 8;
                let key: Vec<u16> = (0..head_dim).map(|d| keys[chunk(d)]).collect();
                bounds("a key", &key, &rotated(r, heads + head));
                let value = to_bf16(head_of(r, heads + kv_heads + head));
                for d in 0..head_dim {
                    expected[0][chunk(d)] = key[d];
                    expected[1][chunk(d)] = value[d];
                }
            }
        }
        assert!(gates == expected_gates, "gates, {heads} heads of {head_dim}");
        assert!(queries == expected_queries, "a query that no row has, {heads} heads of {head_dim}");
        assert!(keys == expected[0], "a key that no row has, {heads} heads of {head_dim}");
        assert!(values == expected[1], "values, {heads} heads of {head_dim}");
    }
}
