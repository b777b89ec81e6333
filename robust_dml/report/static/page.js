const bare=cell=>(cell?cell.textContent:'').trim().replace(/^[^\p{L}\p{N}+−.-]+/u,'').replace(/−/g,'-').replace(/(\d),(?=\d{3})/g,'$1');
function sort(table,at,up){
  const key=row=>bare(row.cells[at]),rows=table.home.flat(),number=rows.filter(r=>!isNaN(parseFloat(key(r)))).length*2>rows.length;
  const order=(a,b)=>{const [x,y]=[key(a),key(b)],[m,n]=[parseFloat(x),parseFloat(y)];
    if(!number)return !x||!y?!x-!y:up*x.localeCompare(y,undefined,{numeric:true});
    return isNaN(m)||isNaN(n)?isNaN(m)-isNaN(n):up*(m-n)};
  table.home.forEach((block,k)=>{const end=table.ends[k];(up?[...block].sort(order):block).forEach(row=>table.tBodies[0].insertBefore(row,end))})}
function press(table,th,at){
  const now=th.getAttribute('aria-sort'),next={ascending:'descending',descending:''}[now]??'ascending';
  table.querySelectorAll('th[aria-sort]').forEach(other=>other.removeAttribute('aria-sort'));
  if(next)th.setAttribute('aria-sort',next);
  sort(table,at,{ascending:1,descending:-1}[next]||0)}
function blocks(table){
  table.home=[[]];table.ends=[];
  for(const row of table.tBodies[0].rows)if(row.classList.contains('setting')){table.ends.push(row);table.home.push([])}else table.home.at(-1).push(row);
  table.ends.push(null)}
for(const table of document.querySelectorAll('.box:not(.fixed) table')){
  blocks(table);
  if(!table.tHead||!table.home.some(block=>block.length>1))continue;
  const taken=[];
  [...table.tHead.rows].forEach((row,y)=>{let x=0;for(const th of row.cells){
    taken[y]??=[];while(taken[y][x])x++;
    for(let j=0;j<th.rowSpan;j++)for(let i=0;i<th.colSpan;i++)(taken[y+j]??=[])[x+i]=true;
    const at=x;x+=th.colSpan;
    if(th.scope!='col'||!th.textContent.trim())continue;
    const button=document.createElement('button');button.type='button';button.title='sort';button.append(...th.childNodes);th.append(button);button.onclick=()=>press(table,th,at)}})}
document.querySelectorAll('.query').forEach((query,k)=>{
  const label=document.createElement('label'),input=document.createElement('input'),shown=document.createElement('output');
  Object.assign(input,{type:'range',min:0,max:100,value:100});label.className='slide';shown.value='100 %';
  input.setAttribute('aria-label',`query ${k+1}: share of the change in percent`);
  input.oninput=()=>{query.style.setProperty('--share',input.value/100);shown.value=input.value+' %'};
  label.append('clean',input,'attacked',shown);query.querySelector('.set').append(label)});
